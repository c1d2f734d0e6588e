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
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from ullage.catalog import load, nearest
from ullage.errors import InputError
from ullage.frozen import Frozen
from ullage.i18n import _
from ullage.read.flag_values import count_of_bytes, fraction, gib, length, whole
from ullage.read.shell_line import image_end, is_unset, split_command, unset_variable
from ullage.read.vllm_parts import draft_model, file_flags, optimization, transfer_assumed, with_overrides
from ullage.spec.machine import Machine
from ullage.spec.model import Model
from ullage.spec.serving import ServingJob, ServingParallel

_NUMBER = re.compile(r"-?\d")
_MODULE = "vllm.entrypoints."
_OTHER_COMMANDS = ("bench", "chat", "complete", "collect-env")

#: Flags that take memory and are not counted.
NOT_COUNTED = (
    "enable_lora",
    "offload_group_size",
    "kv_offloading_size",
    "prefill_context_parallel_size",
    "mm_ipc_gpu_memory_gb",
    "enable_dbo",
    "kv_sharing_fast_prefill",
    "enable_eplb",
    "enable_prompt_embeds",
    "mamba_cache_mode",
    "quantization_config",
    "weight_transfer_config",
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
    visible_gpus: int | None = None

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
    command = split_command(line, after_program)
    words = list(command.words)
    flags: list[tuple[str, str]] = []
    model, at = "", 0
    while at < len(words):
        if words[at].startswith("-") and not _NUMBER.match(words[at]):
            at = _one_flag(words, at, flags)
        elif not model:
            model, at = words[at], at + 1
        else:
            raise _stray(words[at])
    said = next((value for name, value in reversed(flags) if name == "config"), None)
    flags = [*(file_flags(said) or () if said else ()), *flags]  # what is typed wins over the file
    named = model or next((value for name, value in reversed(flags) if name == "model"), "")
    return VllmCommand(
        model=named,
        flags=tuple(flags),
        environment=command.environment,
        line=line.strip(),
        visible_gpus=command.visible_gpus,
    )


def _stray(word: str) -> InputError:
    if is_unset(word):
        return unset_variable(word)
    return InputError(_("{word!r} belongs to no flag").format(word=word[:80]))


def after_program(words: list[str]) -> int | None:
    """Return where the flags begin: after ``vllm serve``, the module of the server, or the image of a container.

    Raises:
        InputError: another command of vLLM, which starts no server.
    """
    for index, word in enumerate(words):
        if word.startswith(_MODULE):
            return index + 1
        name = word.rsplit("/", 1)[-1]
        if name not in ("vllm", "lmcache_vllm") or index + 1 == len(words):
            continue
        if words[index + 1] == "serve":
            return index + 2
        if words[index + 1] in _OTHER_COMMANDS:
            raise InputError(
                _("vllm {command} starts no server").format(command=words[index + 1]),
                remedy=_("write the line that starts it: vllm serve MODEL …"),
            )
    return image_end(words)


def _one_flag(words: list[str], at: int, flags: list[tuple[str, str]]) -> int:
    """Read the flag at ``at`` into ``flags`` and return where the next word stands."""
    if words[at].startswith("-O"):
        return optimization(words, at, flags)
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
        "lora_target_modules",
        "numa_bind_nodes",
        "numa_bind_cpus",
        "sleep_preserve_parameter_names",
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
    begins = [known for known in _known() if len(base) > 5 and known.startswith(base)]
    if len(begins) == 1:  # argparse takes an abbreviation that is the only one
        return begins[0] + name.removeprefix(base), False
    if base == "omni":
        raise InputError(
            _("--omni starts vLLM-Omni, whose models make pictures, sound or video: ullage does not know its memory")
        )
    similar = ", ".join("--" + known.replace("_", "-") for known in nearest(name or word, list(_known()), limit=3))
    raise InputError(
        _("the vLLM flag {flag} is not known").format(flag=word[:80]),
        remedy=_("the nearest known are {similar}").format(similar=similar),
    )


#: flag → (field of the job, reader)
_FIELDS: dict[str, tuple[str, Callable[[str, str], Any]]] = {
    "max_model_len": ("max_model_len", length),
    "max_num_seqs": ("max_num_seqs", whole),
    "max_num_batched_tokens": ("max_num_batched_tokens", whole),
    "gpu_memory_utilization": ("memory_fraction", fraction),
    "kv_cache_memory_bytes": ("kv_cache_memory_bytes", count_of_bytes),
    "block_size": ("block_size", whole),
    "cpu_offload_gb": ("cpu_offload_bytes", gib),
    "max_cudagraph_capture_size": ("cuda_graph_max_batch_size", whole),
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
        found["cuda_graph_max_batch_size"] = whole(str(largest), "--compilation-config")
    return found


def _parallel(command: VllmCommand) -> ServingParallel:
    def size(name: str) -> int:
        text = command.get(name)
        value = 1 if text is None else whole(text, _flag(name))
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


def _speculative(command: VllmCommand) -> tuple[str, str, int | None]:
    """Return the method of speculation (empty: none), the model named for it, and the tokens drafted."""
    config = _json(command, "speculative_config")
    method = config.get("method") or command.get("spec_method")
    draft = config.get("model") or command.get("spec_model") or command.get("speculative_model")
    tokens = config.get("num_speculative_tokens") or command.get("spec_tokens") or command.get("num_speculative_tokens")
    name = str(method or ("draft" if draft else ""))
    return name, str(draft or ""), whole(str(tokens), "--speculative-config") if tokens else None


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
    method, _draft, tokens = _speculative(command)
    found.update({"speculative": method} if method else {})
    found.update({} if tokens is None else {"num_speculative_tokens": tokens})
    redundant = _json(command, "eplb_config").get("num_redundant_experts")
    if redundant is not None:
        found["redundant_experts"] = whole(str(redundant), "--eplb-config")
    found["flags"] = (*command.flags, *command.environment)
    skipped = [flag for flag in NOT_COUNTED if command.get(flag) not in (None, "false", "0")]
    said = [_("{flag} takes memory that is not counted").format(flag=_flag(flag)) for flag in skipped]
    if command.get("config") and file_flags(command.get("config") or "") is None:
        missing = _("--config: the file {name} is not here, what it sets is not counted")
        said.append(missing.format(name=(command.get("config") or "")[:80]))
    if dict(command.environment).get("VLLM_USE_V1") == "0":
        said.append(_("VLLM_USE_V1=0: the rules are those of the engine that is this version's default"))
    found["assumed"] = (*said, *transfer_assumed(_json(command, "kv_transfer_config")))
    return found


def serving_job(
    command: VllmCommand,
    *,
    model: Model,
    machine: Machine,
    engine_version: str,
    load: Callable[[str], Model] | None = None,
) -> ServingJob:
    """Return the job of a line on a machine; ``load`` finds the model that drafts.

    Raises:
        InputError: a value that cannot be read.
    """
    found = settings(command)
    method, name, _tokens = _speculative(command)
    draft, said = draft_model(method.lower(), name, command.model, load)
    found["assumed"] = (*found["assumed"], *said)
    return ServingJob(
        model=with_overrides(model, command.flags),
        machine=machine,
        engine="vllm",
        engine_version=engine_version,
        draft_model=draft,
        **found,
    )
