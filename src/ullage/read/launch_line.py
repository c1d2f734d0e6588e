"""``vllm:'vllm serve …'``, ``sglang:'…'``, ``llamacpp:'…'`` → :class:`ullage.spec.serving.ServingJob`.

The engine may carry a version (``vllm@0.11:'…'``); in place of the line a file that holds it may be named.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ullage.errors import InputError
from ullage.fitting import ELASTIC_POOLS
from ullage.i18n import _
from ullage.read.jsonfile import MAX_CONFIG_BYTES, is_file
from ullage.read.machine import parse_machine
from ullage.read.model_source import load_model
from ullage.read.shell_line import is_unset
from ullage.request import check_layout, gguf_elsewhere, parse_engine, requantised
from ullage.spec.machine import Machine
from ullage.spec.model import Model
from ullage.spec.serving import ServingJob

if TYPE_CHECKING:
    from ullage.read.llamacpp_args import LlamaCommand

#: Finds the model that a line names, or the one that was named beside it.
Loader = Callable[[str], Model]


def read_launch_line(
    text: str, *, machine: str | None = None, model: str | None = None, assume: bool = False
) -> ServingJob:
    """Read a launch line in an engine's own words.

    Args:
        text: ``engine:line`` or ``engine@version:line``, or ``engine:FILE``.
        machine: the machine; no launch line names it, so it must be given.
        model: wins over the model that the line names.
        assume: go on over config keys that are not understood.

    Raises:
        InputError: unknown engine, a flag that is not known, or no machine.
    """
    head, colon, line = text.partition(":")
    if not colon or not line.strip():
        raise InputError(
            _("{text!r} is not a launch line").format(text=text[:60]),
            where="--from",
            remedy=_("write for example --from vllm:'vllm serve MODEL -tp 8'"),
        )
    engine, version = parse_engine(head)
    if machine is None:
        raise InputError(_("no machine is named"), where="--on", remedy=_("write for example --on 8xH200"))
    line = line_of(line.strip())

    def load(name: str) -> Model:
        if not name or is_unset(name):
            raise _unnamed(name)
        if engine in ELASTIC_POOLS:
            _not_gguf(engine, name)
        return load_model(name, assume=assume, network=True)

    reader = _READERS.get(engine, _llamacpp)
    job = reader(version, line, parse_machine(machine), load, model or "")
    return check_layout(requantised(replace(job, engine=engine, native=line)))


def _not_gguf(engine: str, name: str) -> None:
    """Refuse the name of a GGUF repository and its type, as in ``unsloth/Qwen3-0.6B-GGUF:Q4_K_M``."""
    repository, colon, kind = name.partition(":")
    if colon and repository.lower().endswith("-gguf"):
        raise gguf_elsewhere(engine, kind)


def _unnamed(name: str) -> InputError:
    """Return the error for a line that does not say which model it starts."""
    what = _("the line names its model by {word}").format(word=name[:60]) if name else _("the line names no model")
    return InputError(what, remedy=_("name the model before the line, as in ullage fit serve deepseek-v3 --from …"))


def _seen(machine: Machine, visible: int | None) -> tuple[Machine, tuple[str, ...]]:
    """Return the machine with the GPUs of each node that the line lets the engine see."""
    if visible is None or not visible < machine.gpus_per_node:
        return machine, ()
    said = _("the line leaves {visible} of {count} GPUs visible")
    return replace(machine, gpus_per_node=visible), (said.format(visible=visible, count=machine.gpus_per_node),)


def line_of(text: str) -> str:
    """Return the text, or what the file of that name holds."""
    if len(text.split()) > 1 or not is_file(Path(text)):
        return text
    try:
        if Path(text).stat().st_size > MAX_CONFIG_BYTES:
            raise InputError(_("the file is too large for a launch line"), where=text)
        return Path(text).read_text(encoding="utf-8", errors="replace").strip()
    except OSError as error:
        raise InputError(_("cannot be read ({reason})").format(reason=error.strerror), where=text) from None


def _llamacpp(version: str, line: str, machine: Machine, load: Loader, named: str) -> ServingJob:
    from ullage.read.llamacpp_args import not_counted, parse_command

    command = parse_command(line)
    machine, seen = _seen(machine, command.visible_gpus)
    model, quantization, said = _gguf(command, load, named)
    return ServingJob(
        model=model,
        machine=machine,
        engine="llamacpp",
        engine_version=version,
        quantization=quantization,
        flags=command.flags,
        assumed=(*seen, *said, *not_counted(command.flags)),
    )


def _gguf(command: LlamaCommand, load: Loader, named: str) -> tuple[Model, str | None, tuple[str, ...]]:
    """Return the model of the file or repository that a line of llama.cpp names, its type, and what was assumed."""
    from ullage.read.gguf_name import named_gguf, not_here

    path = command.last("model_path") or command.last("model_url")
    name = path or command.last("hf_repo") or ""
    if named.lower().endswith(".gguf") or not name or (path and is_file(Path(path).expanduser())):
        return load(named or name), None, ()
    found, file = named_gguf(name), command.last("hf_file")
    kind = (named_gguf(file) if file else None) or found
    file_type = kind.file_type if kind is not None else ""
    if not named and found is None:
        raise _unnamed(name) if is_unset(name) else not_here(name)
    model = load(named or (found.model if found is not None else ""))
    said = [_("{name} is not read: taken as {model} by its name").format(name=name[-80:], model=model.name)]
    if model.towers and path is None and command.last("no_mmproj") is None:
        said.append(_("the file of the vision tower that -hf loads beside the model is not counted"))
    return model, f"gguf:{file_type}" if file_type else None, tuple(said)


def _vllm(version: str, line: str, machine: Machine, load: Loader, named: str) -> ServingJob:
    from ullage.read.vllm_args import parse_command, serving_job

    command = parse_command(line)
    machine, seen = _seen(machine, command.visible_gpus)
    model = load(named or command.model)
    job = serving_job(command, model=model, machine=machine, engine_version=version, load=load)
    return replace(job, assumed=(*seen, *job.assumed))


def _sglang(version: str, line: str, machine: Machine, load: Loader, named: str) -> ServingJob:
    from ullage.read.sglang_args import after_program, parse_sglang_args
    from ullage.read.shell_line import split_command

    machine, seen = _seen(machine, split_command(line, after_program).visible_gpus)
    job = parse_sglang_args(line, machine=machine, load_model=load, engine_version=version, model=named)
    return replace(job, assumed=(*seen, *job.assumed))


#: The others speak llama.cpp's words.
_READERS: dict[str, Callable[[str, str, Machine, Loader, str], ServingJob]] = {
    "vllm": _vllm,
    "sglang": _sglang,
}
