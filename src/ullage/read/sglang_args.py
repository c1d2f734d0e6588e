"""``python -m sglang.launch_server …`` and ``sglang serve …`` as typed → :class:`ullage.spec.serving.ServingJob`.

Every flag of SGLang 0.5.23 and the older spellings since 0.4.1 are known by name (``catalog/engines/sglang.json``).
Those that decide memory fill the job's fields, the others are kept in ``ServingJob.flags``; one that is not known is an
error that names it and the nearest known.

Source: sglang@0.5.23:srt/arg_groups/fields, srt/server_args.py:prepare_server_args.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache

from ullage.catalog import load, nearest
from ullage.errors import InputError
from ullage.i18n import _
from ullage.read.model_overrides import overridden, parse_overrides
from ullage.read.shell_line import is_unset, split_command, unset_variable
from ullage.read.vllm_parts import draft_model
from ullage.spec.machine import Machine
from ullage.spec.model import Model
from ullage.spec.serving import ServingJob, ServingParallel
from ullage.units import GiB, parse_count

_CATALOG = "engines/sglang.json"
_MAX_SIZE = 2**20
_MODULES = ("sglang.launch_server", "sglang.bench_one_batch", "sglang.bench_offline_throughput")

#: Other spellings → the name used here.
_ALIASES = {
    "model": "model-path",
    "tp": "tp-size",
    "tensor-parallel-size": "tp-size",
    "pp": "pp-size",
    "pipeline-parallel-size": "pp-size",
    "dp": "dp-size",
    "data-parallel-size": "dp-size",
    "attention-data-parallel-size": "attn-dp-size",
    "ep": "ep-size",
    "expert-parallel-size": "ep-size",
    "decode-context-parallel-size": "dcp-size",
    "attention-context-parallel-size": "attn-cp-size",
    "cuda-graph-max-bs-decode": "cuda-graph-max-bs",
    "cuda-graph-bs-decode": "cuda-graph-bs",
    "speculative-draft-model": "speculative-draft-model-path",
}
#: Flags that change memory in a way the SGLang room does not count.
_NOT_COUNTED = (
    "attn-cp-size",
    "dwdp-size",
    "enable-encoder-swa-bounded-replay",
    "enable-hisparse",
    "enable-kv-cache-sharding",
    "enable-lora",
    "enable-mixed-chunk",
    "enable-symm-mem",
    "enable-two-batch-overlap",
    "enable-unified-memory",
    "enable-double-sparsity",
    "enable-pdmux",
    "hybrid-kvcache-ratio",
    "lora-paths",
    "modelopt-quant",
    "moe-data-parallel-size",
    "moe-dp-size",
    "dllm-algorithm",
    "disaggregation-decode-extra-slots",
    "speculative-draft-model-quantization",
    "torchao-config",
    "uno-lora-path",
    "offload-group-size",
    "paged-experts-num-resident",
    "ple-offload-embedding",
)


@dataclass
class _Line:
    """A parsed line: values by canonical name, in the order typed; the last of a repeated flag counts."""

    values: dict[str, list[str]] = field(default_factory=dict)

    def text(self, name: str) -> str | None:
        """Return the one value of a flag, or None where it was not given."""
        found = self.values.get(name)
        return found[-1] if found else None

    def has(self, name: str) -> bool:
        """Tell whether the flag was given."""
        return name in self.values

    def integer(self, name: str, default: int | None = None, *, least: int = 1) -> int | None:
        """Return a count (``8k`` is understood).

        Raises:
            InputError: not a count, or below ``least``.
        """
        text = self.text(name)
        if text is None or text.lower() in ("none", "null", "auto"):
            return default
        if "$" in text or is_unset(text):
            raise unset_variable(text, f"--{name}")
        value = -parse_count(text[1:]) if text.startswith("-") else parse_count(text)
        if value < least:
            raise InputError(
                _("{value} is too small, it must be at least {least}").format(value=value, least=least),
                where=f"--{name}",
            )
        return value

    def size(self, name: str) -> int:
        """Return a parallel size, 1 where it was not given."""
        value = self.integer(name, 1) or 1
        if value > _MAX_SIZE:
            raise InputError(_("{value} is more than any machine has").format(value=value), where=f"--{name}")
        return value

    def number(self, name: str) -> float | None:
        """Return a number, or None where it was not given."""
        text = self.text(name)
        if text is None or text.lower() in ("none", "null", "auto"):
            return None
        try:
            return float(text)
        except ValueError:
            raise InputError(_("{text!r} is not a number").format(text=text[:80]), where=f"--{name}") from None


def parse_sglang_args(
    line: str, *, machine: Machine, load_model: Callable[[str], Model], engine_version: str = "", model: str = ""
) -> ServingJob:
    """Read an SGLang command line.

    Args:
        line: the whole command, or its flags alone; environment settings and line continuations are understood.
        machine: the machine it is meant for.
        load_model: finds the model that the line names.
        engine_version: the release; empty: the newest known.
        model: wins over the model that the line names.

    Raises:
        InputError: a flag that is not known, a missing or unusable value, or no model.
    """
    command = split_command(line, after_program)
    parsed = _parse(list(command.words))
    name = model or parsed.text("model-path")
    if not name:
        raise InputError(_("no model is named"), where="--model-path", remedy=_("write --model-path MODEL"))
    draft, said = draft_model(_speculative(parsed) or "none", _draft(parsed), name, load_model)
    found = load_model(name)
    overrides = parsed.text("json-model-override-args")
    if overrides:
        flag = "--json-model-override-args"
        found = overridden(found, parse_overrides(overrides, flag), flag)
    job = ServingJob(
        model=found,
        machine=machine,
        engine="sglang",
        engine_version=engine_version,
        parallel=_parallel(parsed),
        quantization=_word(parsed, "quantization"),
        weights_dtype=_word(parsed, "dtype"),
        kv_cache_dtype=parsed.text("kv-cache-dtype"),
        speculative=_speculative(parsed),
        draft_model=draft,
        flags=(*_flags(parsed), *command.environment),
        native=line,
        assumed=(*_not_counted(parsed), *said),
    )
    return _with_numbers(job, parsed)


def _with_numbers(job: ServingJob, parsed: _Line) -> ServingJob:
    """Return the job with the counts and fractions of the line."""
    return replace(
        job,
        max_model_len=parsed.integer("context-length"),
        max_num_seqs=parsed.integer("max-running-requests"),
        max_num_batched_tokens=parsed.integer("chunked-prefill-size", least=-1),
        memory_fraction=parsed.number("mem-fraction-static"),
        enforce_eager=True if parsed.has("disable-cuda-graph") else None,
        block_size=parsed.integer("page-size"),
        cuda_graph_max_batch_size=parsed.integer("cuda-graph-max-bs"),
        cuda_graph_sizes=_sizes(parsed),
        redundant_experts=parsed.integer("ep-num-redundant-experts", 0, least=0) or 0,
        num_speculative_tokens=parsed.integer("speculative-num-steps"),
        cpu_offload_bytes=int((parsed.number("cpu-offload-gb") or 0) * GiB),
    )


def after_program(words: list[str]) -> int | None:
    """Return where the flags begin: after the module of the server, or after ``sglang serve``."""
    for index, word in enumerate(words):
        if word in _MODULES:
            return index + 1
        if word == "serve" and index and words[index - 1].rsplit("/", 1)[-1] == "sglang":
            return index + 1
    return None


@lru_cache(maxsize=1)
def _known() -> dict[str, str]:
    """Return every flag with the values it takes: 0 none, 1 one, ? none or one, * one or more."""
    flags = load(_CATALOG)["flags"]
    found = {}
    for kind, mark in (("none", "0"), ("one", "1"), ("optional", "?"), ("list", "*")):
        found.update(dict.fromkeys(flags[kind], mark))
    for alias in ("tp", "dp", "pp", "ep", "model"):
        found.setdefault(alias, "1")
    return found


def _resolve(name: str) -> str:
    """Return the known flag that ``name`` is, or is the only abbreviation of (as argparse takes it).

    Raises:
        InputError: not known, or several begin with it.
    """
    known = _known()
    if name in known:
        return name
    begins = [flag for flag in known if flag.startswith(name)] if len(name) > 2 else []
    if len({_ALIASES.get(flag, flag) for flag in begins}) == 1:
        return begins[0]
    likely = begins[:4] if begins else nearest(name.replace("_", "-"), list(known), limit=3)
    raise InputError(
        _("--{name} is not a flag of SGLang").format(name=name[:80]),
        remedy=_("near to it are {known}").format(known=", ".join(f"--{flag}" for flag in likely)),
    )


def _parse(words: list[str]) -> _Line:
    line, index = _Line(), 0
    while index < len(words):
        word = words[index]
        index += 1
        if not word.startswith("--"):
            if not line.values and not word.startswith("-"):
                line.values["model-path"] = [word]
                continue
            if is_unset(word):
                raise unset_variable(word)
            raise InputError(_("{word!r} stands where a flag should").format(word=word[:80]))
        name, equals, value = word[2:].partition("=")
        flag = _resolve(name)
        kind = _known()[flag]
        values = [value] if equals else []
        if not equals:
            taken = _values(words, index, kind)
            index, values = index + len(taken), taken
        if kind in "1*" and not values:
            raise InputError(_("--{name} wants a value").format(name=name))
        line.values[_ALIASES.get(flag, flag)] = values
    return line


def _values(words: list[str], index: int, kind: str) -> list[str]:
    """Return the values that follow a flag of ``kind``."""
    most = {"0": 0, "1": 1, "?": 1, "*": len(words)}[kind]
    found: list[str] = []
    for word in words[index : index + most]:
        if word.startswith("-") and not re.fullmatch(r"-\d+(\.\d+)?", word):
            break
        found.append(word)
    return found


def _word(line: _Line, name: str) -> str | None:
    text = line.text(name)
    return None if text is None or text.lower() in ("auto", "none") else text


def _parallel(line: _Line) -> ServingParallel:
    dp, attention_dp = line.size("dp-size"), line.size("attn-dp-size")
    if attention_dp > 1 and dp > 1:
        raise InputError(
            _("replicas of replicas are not understood: --dp-size {dp} with --attn-dp-size {attention}").format(
                dp=dp, attention=attention_dp
            ),
            remedy=_("give one of them, and count one replica"),
        )
    expert = line.integer("ep-size")
    return ServingParallel(
        tensor_parallel_size=line.size("tp-size"),
        pipeline_parallel_size=line.size("pp-size"),
        data_parallel_size=max(dp, attention_dp),
        expert_parallel=line.has("enable-ep-moe") or (expert or 1) > 1,
        expert_parallel_size=expert,
        dp_attention=attention_dp > 1 or (line.has("enable-dp-attention") and dp > 1),
        decode_context_parallel_size=line.size("dcp-size"),
    )


def _sizes(line: _Line) -> tuple[int, ...] | None:
    values = line.values.get("cuda-graph-bs")
    if not values:
        return None
    return tuple(parse_count(part) for value in values for part in value.replace(",", " ").split())


def _speculative(line: _Line) -> str | None:
    algorithm = _word(line, "speculative-algorithm")
    if algorithm is None:
        return None
    return {"NEXTN": "mtp", "EAGLE": "eagle", "STANDALONE": "draft"}.get(algorithm.upper(), algorithm.lower())


def _draft(line: _Line) -> str:
    """Return the name of the draft model, empty where nothing is drafted."""
    return (line.text("speculative-draft-model-path") or "") if _speculative(line) else ""


def _flags(line: _Line) -> tuple[tuple[str, str], ...]:
    """Return all flags as (name with underscores, value); a switch has the value ``true``."""
    found = [(name.replace("-", "_"), " ".join(values) or "true") for name, values in line.values.items()]
    return tuple((name, value) for name, value in found if name not in ("model_path", "cuda_graph_bs"))


def _not_counted(line: _Line) -> tuple[str, ...]:
    sentence = _("--{name}: its influence on memory is not counted")
    return tuple(sentence.format(name=name) for name in _NOT_COUNTED if line.has(name))
