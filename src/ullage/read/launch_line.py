"""``vllm:'vllm serve …'``, ``sglang:'…'``, ``llamacpp:'…'`` → :class:`ullage.spec.serving.ServingJob`.

The engine may carry a version (``vllm@0.11:'…'``); in place of the line a file that holds it may be named.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ullage.errors import InputError
from ullage.i18n import _
from ullage.read.jsonfile import MAX_CONFIG_BYTES, is_file
from ullage.read.machine import parse_machine
from ullage.read.model_source import load_model
from ullage.request import check_layout, parse_engine, requantised
from ullage.spec.machine import Machine
from ullage.spec.model import Model
from ullage.spec.serving import ServingJob

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
        return load_model(model or name, assume=assume, network=True)

    reader = _READERS.get(engine, _llamacpp)
    job = reader(version, line, parse_machine(machine), load)
    return check_layout(requantised(replace(job, engine=engine, native=line)))


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


def _llamacpp(version: str, line: str, machine: Machine, load: Loader) -> ServingJob:
    from ullage.read.llamacpp_args import parse_command

    command = parse_command(line)
    name = command.last("model_path") or command.last("hf_repo") or ""
    return ServingJob(model=load(name), machine=machine, engine="llamacpp", engine_version=version, flags=command.flags)


def _vllm(version: str, line: str, machine: Machine, load: Loader) -> ServingJob:
    from ullage.read.vllm_args import parse_command, serving_job

    command = parse_command(line)
    return serving_job(command, model=load(command.model), machine=machine, engine_version=version)


def _sglang(version: str, line: str, machine: Machine, load: Loader) -> ServingJob:
    from ullage.read.sglang_args import parse_sglang_args

    return parse_sglang_args(line, machine=machine, load_model=load, engine_version=version)


#: The others speak llama.cpp's words.
_READERS: dict[str, Callable[[str, str, Machine, Loader], ServingJob]] = {
    "vllm": _vllm,
    "sglang": _sglang,
}
