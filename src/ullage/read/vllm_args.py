"""A ``vllm serve`` line, as typed → the settings of a serving job.

Read are ``vllm serve MODEL ...``, ``python -m vllm.entrypoints.openai.api_server --model MODEL ...``, environment
assignments before them, and bare lists of flags. Every flag of vLLM 0.33.0 is known by name
(``catalog/engines/vllm_flags.json``); one that is not known is an error that names it and the nearest known ones. Flags
that take memory and are not counted are said so in ``assumed``.

Source: vllm@0.33.0:vllm/engine/arg_utils.py:EngineArgs.add_cli_args, vllm/utils/argparse_utils.py.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from ullage.catalog import load, nearest
from ullage.errors import InputError
from ullage.frozen import Frozen
from ullage.i18n import _
from ullage.spec.machine import Machine
from ullage.spec.model import Model
from ullage.spec.serving import ServingJob, ServingParallel
from ullage.units import GiB, parse_count, parse_size

MAX_LINE = 100_000
_ASSIGNMENT = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)=(.*)", re.DOTALL)
_NUMBER = re.compile(r"-?\d")
_MODULE = "vllm.entrypoints."

#: Flags that take memory and are not counted.
NOT_COUNTED = (
    "enable_lora",
    "offload_group_size",
    "kv_offloading_size",
    "prefill_context_parallel_size",
    "mm_ipc_gpu_memory_gb",
    "enable_dbo",
    "kv_sharing_fast_prefill",
    "hf_overrides",
    "config",
    "additional_config",
    "diffusion_config",
    "engram_config",
)


class VllmCommand(Frozen):
    """A line as understood: the model as typed, flags (dashes as underscores) in order, environment assignments."""

    model: str
    flags: tuple[tuple[str, str], ...]
    environment: tuple[tuple[str, str], ...] = ()
    line: str = ""

    def get(self, name: str) -> str | None:
        """Return the value of the last flag called ``name``: a later flag wins."""
        return next((value for key, value in reversed(self.flags) if key == name), None)

    def truth(self, name: str) -> bool | None:
        """Return a switch: None when it was not given."""
        value = self.get(name)
        return None if value is None else value.lower() in ("true", "1", "yes")


@lru_cache(maxsize=1)
def _known() -> dict[str, bool]:
    """Return every known flag: whether it takes a value."""
    data = load("engines/vllm_flags.json")
    found = dict.fromkeys([*data["switches"], *data["older_switches"]], False)
    return {**found, **dict.fromkeys([*data["valued"], *data["older_valued"]], True)}


def parse_command(line: str) -> VllmCommand:
    """Parse a line.

    Raises:
        InputError: quotes that do not close, a flag that is not known, a value that is missing.
    """
    if len(line) > MAX_LINE:
        raise InputError(_("the command line is longer than {limit} characters").format(limit=MAX_LINE))
    try:
        words = shlex.split(line.replace("\\\n", " "), comments=True)
    except ValueError as error:
        raise InputError(_("the command line cannot be split: {error}").format(error=error)) from error
    environment, words = _environment(words)
    words = _after_program(words)
    flags: list[tuple[str, str]] = []
    model, at = "", 0
    while at < len(words):
        if words[at].startswith("-") and not _NUMBER.match(words[at]):
            at = _one_flag(words, at, flags)
        elif not model:
            model, at = words[at], at + 1
        else:
            raise InputError(_("{word!r} belongs to no flag").format(word=words[at][:80]))
    named = next((value for name, value in reversed(flags) if name == "model"), model)
    return VllmCommand(model=named, flags=tuple(flags), environment=environment, line=line.strip())


def _environment(words: list[str]) -> tuple[tuple[tuple[str, str], ...], list[str]]:
    """Take ``env`` and assignments off the front."""
    found: list[tuple[str, str]] = []
    at = 0
    while at < len(words):
        match = _ASSIGNMENT.fullmatch(words[at])
        if match is not None:
            found.append((match.group(1), match.group(2)))
        elif words[at] not in ("env", "export", "$", "&&", ";", "nohup"):
            break
        at += 1
    return tuple(found), words[at:]


def _after_program(words: list[str]) -> list[str]:
    """Take the program off: ``vllm serve``, ``python -m vllm.entrypoints.openai.api_server``, or nothing."""
    for index, word in enumerate(words[:8]):
        if word.startswith(_MODULE):
            return words[index + 1 :]
        if word == "serve" and index and words[index - 1].endswith("vllm"):
            return words[index + 1 :]
    return words


def _one_flag(words: list[str], at: int, flags: list[tuple[str, str]]) -> int:
    """Read the flag at ``at`` into ``flags`` and return where the next word stands."""
    word, _equals, value = words[at].partition("=")
    given = bool(_equals)
    name, negated = _canonical(word)
    base = name.split(".", 1)[0]
    if not _known()[base]:
        following = words[at + 1].lower() if at + 1 < len(words) else ""
        if not given and following in ("true", "false"):
            value, given, at = following, True, at + 1
        flags.append((name, "false" if negated else (value.lower() if given else "true")))
        return at + 1
    if given:
        flags.append((name, value))
        return at + 1
    values: list[str] = []
    at += 1
    while at < len(words) and (not words[at].startswith("-") or _NUMBER.match(words[at])):
        values.append(words[at])
        at += 1
        if base not in _LISTS:
            break
    if not values:
        raise InputError(_("{flag} needs a value").format(flag=word))
    flags.append((name, " ".join(values)))
    return at


#: Flags that take several words.
_LISTS = frozenset(
    (
        "cudagraph_capture_sizes",
        "cuda_graph_sizes",
        "served_model_name",
        "lora_modules",
        "middleware",
        "device_ids",
        "ignore_patterns",
        "default_mm_loras",
        "api_key",
        "allowed_media_domains",
        "kv_cache_dtype_skip_layers",
        "collect_detailed_traces",
        "disable_access_log_for_endpoints",
        "logits_processors",
    )
)


def _canonical(word: str) -> tuple[str, bool]:
    """Return the flag's name with underscores, and whether it is switched off.

    Raises:
        InputError: the flag is not known.
    """
    aliases = load("engines/vllm_flags.json")["aliases"]
    if word in aliases:
        return str(aliases[word]), False
    short = word.split(".", 1)
    if short[0] in aliases:
        return ".".join([str(aliases[short[0]]), *short[1:]]), False
    name = word.lstrip("-").replace("-", "_") if word.startswith("--") else ""
    base = name.split(".", 1)[0]
    if base in _known():
        return name, False
    for prefix, stead in (("no_", ""), ("disable_", "enable_")):
        positive = stead + base.removeprefix(prefix)
        if base.startswith(prefix) and _known().get(positive) is False:
            return positive, True
    similar = ", ".join("--" + known.replace("_", "-") for known in nearest(name or word, list(_known()), limit=3))
    raise InputError(
        _("the vLLM flag {flag} is not known").format(flag=word[:80]),
        remedy=_("the nearest known are {similar}").format(similar=similar),
    )


def _whole(text: str, flag: str) -> int:
    try:
        return parse_count(text)
    except InputError as error:
        raise InputError(_("{text!r} is not a whole number").format(text=text[:40]), where=flag) from error


def _length(text: str, flag: str) -> int:
    return -1 if text in ("-1", "auto") else _whole(text, flag)


def _fraction(text: str, flag: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= 1:
        raise InputError(_("{text!r} is not a fraction in (0, 1]").format(text=text[:40]), where=flag)
    return value


def _gib(text: str, flag: str) -> int:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1 << 30:
        raise InputError(_("{text!r} is not a size in GiB").format(text=text[:40]), where=flag)
    return int(value * GiB)


def _bytes(text: str, flag: str) -> int:
    try:
        return parse_count(text)
    except InputError:
        return parse_size(text)


#: flag → (field of the job, reader)
_FIELDS: dict[str, tuple[str, Callable[[str, str], Any]]] = {
    "max_model_len": ("max_model_len", _length),
    "max_num_seqs": ("max_num_seqs", _whole),
    "max_num_batched_tokens": ("max_num_batched_tokens", _whole),
    "gpu_memory_utilization": ("memory_fraction", _fraction),
    "kv_cache_memory_bytes": ("kv_cache_memory_bytes", _bytes),
    "block_size": ("block_size", _whole),
    "cpu_offload_gb": ("cpu_offload_bytes", _gib),
    "max_cudagraph_capture_size": ("cuda_graph_max_batch_size", _whole),
}


def _json(command: VllmCommand, name: str) -> dict[str, Any]:
    """Return a flag that holds JSON, with its dotted parts (``--speculative-config.method mtp``) laid over it."""
    found: dict[str, Any] = {}
    for key, value in command.flags:
        if key == name and value.lstrip().startswith("{"):
            try:
                parsed = json.loads(value)
            except ValueError as error:
                raise InputError(_("the value is not JSON: {error}").format(error=error), where=_flag(name)) from error
            found.update(parsed if isinstance(parsed, dict) else {})
        elif key.startswith(name + "."):
            found[key.removeprefix(name + ".")] = value
    return found


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in re.findall(r"\d{1,7}", text))


def _graphs(command: VllmCommand, compilation: dict[str, Any]) -> dict[str, Any]:
    listed = compilation.get("cudagraph_capture_sizes")
    text = command.get("cudagraph_capture_sizes") or command.get("cuda_graph_sizes") or (str(listed) if listed else "")
    sizes = _sizes(text)
    found: dict[str, Any] = {}
    if len(sizes) == 1 and command.get("cuda_graph_sizes"):
        found["cuda_graph_max_batch_size"] = sizes[0]
    elif sizes:
        found["cuda_graph_sizes"] = sizes
    largest = compilation.get("max_cudagraph_capture_size")
    if largest is not None:
        found["cuda_graph_max_batch_size"] = _whole(str(largest), "--compilation-config")
    return found


def _parallel(command: VllmCommand) -> ServingParallel:
    def size(name: str) -> int:
        text = command.get(name)
        value = 1 if text is None else _whole(text, _flag(name))
        if value < 1:
            raise InputError(_("{value} is not a size").format(value=value), where=_flag(name))
        return value

    partition = dict(command.environment).get("VLLM_PP_LAYER_PARTITION")
    data = size("data_parallel_size")
    expert = bool(command.truth("enable_expert_parallel"))
    return ServingParallel(
        tensor_parallel_size=size("tensor_parallel_size"),
        pipeline_parallel_size=size("pipeline_parallel_size"),
        data_parallel_size=data,
        expert_parallel=expert,
        dp_attention=expert and data > 1,
        decode_context_parallel_size=size("decode_context_parallel_size"),
        pipeline_layers=_sizes(partition) if partition else None,
    )


def _speculative(command: VllmCommand) -> dict[str, Any]:
    config = _json(command, "speculative_config")
    method = config.get("method") or command.get("spec_method")
    draft = config.get("model") or command.get("spec_model") or command.get("speculative_model")
    tokens = config.get("num_speculative_tokens") or command.get("spec_tokens") or command.get("num_speculative_tokens")
    found: dict[str, Any] = {}
    if method or draft:
        found["speculative"] = str(method or "draft")
    if tokens:
        found["num_speculative_tokens"] = _whole(str(tokens), "--speculative-config")
    return found


def settings(command: VllmCommand) -> dict[str, Any]:
    """Return the fields of :class:`~ullage.spec.serving.ServingJob` that the line states (model and machine aside).

    Raises:
        InputError: a value that cannot be read.
    """
    found: dict[str, Any] = {"parallel": _parallel(command), "native": command.line}
    for flag, (field, read) in _FIELDS.items():
        text = command.get(flag)
        if text is not None:
            found[field] = read(text, _flag(flag))
    for flag, field in (
        ("quantization", "quantization"),
        ("dtype", "weights_dtype"),
        ("kv_cache_dtype", "kv_cache_dtype"),
    ):
        if command.get(flag) is not None:
            found[field] = command.get(flag)
    if command.truth("enforce_eager") is not None:
        found["enforce_eager"] = command.truth("enforce_eager")
    found.update(_graphs(command, _json(command, "compilation_config")))
    found.update(_speculative(command))
    redundant = _json(command, "eplb_config").get("num_redundant_experts")
    if redundant is not None:
        found["redundant_experts"] = _whole(str(redundant), "--eplb-config")
    found["flags"] = (*command.flags, *command.environment)
    skipped = [flag for flag in NOT_COUNTED if command.get(flag) not in (None, "false", "0")]
    found["assumed"] = tuple(_("{flag} takes memory that is not counted").format(flag=_flag(flag)) for flag in skipped)
    return found


def serving_job(command: VllmCommand, *, model: Model, machine: Machine, engine_version: str) -> ServingJob:
    """Return the job of a line on a machine.

    Raises:
        InputError: a value that cannot be read.
    """
    return ServingJob(model=model, machine=machine, engine="vllm", engine_version=engine_version, **settings(command))
