"""A job's flags, resolved: what was typed, what a log said, and the defaults of the version, each noted."""

from __future__ import annotations

import re
from typing import Any

from ullage.account.gguf_types import ggml_type
from ullage.engines.llamacpp.defaults import by_memory, default, default_entry, version_day
from ullage.engines.llamacpp.values import integer, overrides
from ullage.errors import InputError, LayoutError
from ullage.frozen import Frozen
from ullage.i18n import _
from ullage.spec.model import LatentAttention
from ullage.spec.serving import ServingJob
from ullage.units import MAX_COUNT, round_up

#: names that logs and records use → names of :mod:`ullage.read.llamacpp_args`
_ALIASES = {
    "num_ctx": "n_ctx",
    "ctx_size": "n_ctx",
    "batch_size": "n_batch",
    "num_batch": "n_batch",
    "ubatch_size": "n_ubatch",
    "n_seq_max": "parallel",
    "num_parallel": "parallel",
    "np": "parallel",
    "fa": "flash_attn",
    "mla_attn": "mla",
    "mla_use": "mla",
    "amb": "attn_max_batch",
    "attn_max_b": "attn_max_batch",
    "fmoe": "fused_moe",
    "rtr": "run_time_repack",
    "ngl": "n_gpu_layers",
    "gpu_layers": "n_gpu_layers",
    "num_gpu": "n_gpu_layers",
    "ts": "tensor_split",
    "sm": "split_mode",
    "mg": "main_gpu",
    "ot": "override_tensor",
    "ctk": "cache_type_k",
    "ctv": "cache_type_v",
    "nkvo": "no_kv_offload",
    "layers.offload": "offloaded",
    "ser": "smart_expert_reduction",
}
_OFF = ("0", "off", "false", "none", "no")


class Settings(Frozen):
    """Everything that decides where memory goes.

    Attributes:
        engine, day: of the family, and the day of the version.
        num_devices: cards; n_gpu_layers: layers offloaded, the output layer counted last.
        split_known: whether ``tensor_split`` is what was typed; a log does not tell.
        overrides: (pattern, buffer) in order; the first whose pattern is found in a tensor's name decides.
        n_ctx: cells of the cache; sequence_ctx: of one sequence.
        parallel: sequences; kv_unified: one cache for all of them.
        cache_type_k, cache_type_v: ggml types.
        latent_cache: "expanded", "key_and_value", "key" or "by_mode" (ik: ``mla``).
        fused_moe: None when a run's flag is not known and either may be.
        pipeline_copies: of what crosses devices, when pipeline parallelism is on.
        output_first: the output layer is offloaded before any other.
        mask_f16: the attention mask is F16 from the start instead of a cast; groups_one_by_one: head groups of latent
            attention are used as soon as they are expanded; num_outputs: rows of logits reserved.
        window_cache: sliding-window layers have a smaller cache.
        fit: what was not typed is made smaller at the start until it fits.
        assumed: what was taken for granted.
    """

    engine: str
    day: str
    num_devices: int
    n_gpu_layers: int
    split_mode: str
    tensor_split: tuple[float, ...] | None
    split_known: bool
    main_gpu: int
    overrides: tuple[tuple[str, str], ...]
    n_ctx: int
    sequence_ctx: int
    n_ubatch: int
    parallel: int
    kv_unified: bool
    cache_type_k: str
    cache_type_v: str
    flash_attention: bool
    kv_offload: bool
    op_offload: bool
    mla: int
    latent_cache: str
    attention_max_mib: int
    fused_moe: bool | None
    repack: bool
    window_cache: bool
    fused_glu: bool
    pipeline_copies: int
    output_first: bool
    mask_f16: bool
    groups_one_by_one: bool
    num_outputs: int
    fit: bool
    assumed: tuple[str, ...]

    @property
    def ik(self) -> bool:
        """Whether this is ik_llama.cpp."""
        return self.engine == "ik_llama.cpp"


class _Request(Frozen):
    """The job's flags by canonical name, with the day whose defaults hold. ``assumed`` collects what was filled in."""

    job: ServingJob
    flags: dict[str, list[str]]
    day: str
    assumed: list[str]
    typed: bool

    def default(self, name: str) -> Any:
        """Return the engine's default of that day; one that could not be verified is noted as assumed."""
        entry = default_entry(self.job.engine, name, self.day)
        note = entry.get("note", "") if entry.get("certainty") == "unverified" else ""
        if note and note not in self.assumed:
            self.assumed.append(note)
        machine = self.job.machine
        return by_memory(entry.get("value"), machine.gpu.total_bytes * machine.num_gpus)

    def text(self, name: str, fallback: str = "") -> str:
        """Return the last value of a flag."""
        return self.flags.get(name, [fallback])[-1]

    def integer(self, name: str, given: int | None = None) -> int:
        """Return a flag, the job's own field, or the default, which is then noted."""
        if name in self.flags:
            return integer(name, self.flags[name][-1])
        if given is not None:
            return given
        value = self.default(name)
        said = _("{name} = {value}, the default of {day}").format(name=name, value=value, day=self.day)
        self.assumed.append(said + _(": the length that the model was trained on") * (name == "n_ctx" and value == 0))
        return int(value or 0)

    def switch(self, name: str, fallback: Any) -> bool:
        """Return whether a switch is on; ``no_<name>`` turns it off."""
        if f"no_{name}" in self.flags:
            return False
        return self.flags[name][-1].lower() not in _OFF if name in self.flags else bool(fallback)


def resolve(job: ServingJob) -> Settings:
    """Fill in the defaults of the job's version.

    Raises:
        InputError: a value cannot be read.
        LayoutError: values that cannot go together.
    """
    day, named = version_day(job.engine, job.engine_version)
    typed = bool(job.native) or any(name in ("command", "n_gpu_layers") for name, _value in job.flags)
    request = _Request(job=job, flags=_flags(job), day=day, assumed=[], typed=typed)
    if not named:
        request.assumed.append(
            _("version {version!r} not understood: rules of {day}").format(version=job.engine_version, day=day)
        )
    placed, shaped, cached = _placing(request), _shape(request), _caching(request)
    if placed["overrides"] and job.machine.num_gpus > 1 and placed["pipeline_copies"] > 1:
        placed["pipeline_copies"] = 1
        request.assumed.append(_("with tensor overrides one copy of what crosses devices: pipeline parallelism is off"))
    return Settings(engine=job.engine, day=day, **placed, **shaped, **cached, assumed=tuple(request.assumed))


def _placing(request: _Request) -> dict[str, Any]:
    """Return the settings that say which device holds what."""
    num_devices = request.job.machine.num_gpus
    return {
        "num_devices": num_devices,
        "n_gpu_layers": _gpu_layers(request.job, request.flags, num_devices, request.assumed),
        "split_mode": request.text("split_mode", "layer"),
        "tensor_split": _split(request.flags),
        "split_known": num_devices < 2 or "tensor_split" in request.flags or not _from_log(request),
        "main_gpu": _main_gpu(request, num_devices),
        "overrides": overrides(request.flags),
        "kv_offload": "no_kv_offload" not in request.flags,
        "op_offload": "no_op_offload" not in request.flags,
        "repack": request.switch("run_time_repack", False),
        "output_first": bool(request.default("output_first")),
        "pipeline_copies": int(request.default("pipeline_copies")),
    }


def _from_log(request: _Request) -> bool:
    """Whether the job is known from a start-up log alone, which does not print every flag."""
    return "offloaded" in request.flags and not request.typed


def _main_gpu(request: _Request, num_devices: int) -> int:
    number = integer("main_gpu", request.text("main_gpu", "0"))
    if num_devices and not 0 <= number < num_devices:
        raise LayoutError(_("-mg {number}: there are {count} devices").format(number=number, count=num_devices))
    return number


def _shape(request: _Request) -> dict[str, Any]:
    """Return the settings that shape the graph: context, batches, fusions."""
    job = request.job
    flash = _flash(request)
    n_ctx = request.integer("n_ctx", job.max_model_len) or job.model.max_position_embeddings or 4096
    parallel = max(1, request.integer("parallel", job.max_num_seqs))
    own = job.engine == "ollama" or _context_is_of_one_sequence(request)
    if job.engine == "ollama":  # ollama@v0.9.6:llm/server.go: never more than trained
        n_ctx = min(n_ctx, job.model.max_position_embeddings or n_ctx)
    if own:
        n_ctx *= parallel
    if not 0 < n_ctx <= MAX_COUNT:
        raise InputError(_("a context of {count} tokens is not possible").format(count=n_ctx))
    n_ctx = round_up(n_ctx, 256 if flash or job.engine != "ik_llama.cpp" else 32)
    n_batch = max(1, min(n_ctx, request.integer("n_batch")))
    n_ubatch = max(1, min(n_batch, request.integer("n_ubatch", job.max_num_batched_tokens)))
    rows = integer("worst_graph_tokens", request.text("worst_graph_tokens", "0"))
    fused: bool | None = request.switch("fused_moe", request.default("fused_moe"))
    if "fused_moe" not in request.flags and job.engine == "ik_llama.cpp" and _from_log(request):
        fused = None
    return {
        "flash_attention": flash,
        "n_ctx": n_ctx,
        "sequence_ctx": n_ctx // parallel if own or not request.switch("kv_unified", _unified(request)) else n_ctx,
        "parallel": parallel,
        "n_ubatch": n_ubatch,
        "num_outputs": min(n_ubatch, rows) if rows > 0 else n_ubatch,
        "fused_moe": fused,
        "fused_glu": bool(request.default("fused_glu")),
        "mask_f16": bool(request.default("mask_f16")) and flash,
        "attention_max_mib": integer(
            "attn_max_batch", request.text("attn_max_batch", str(request.default("attn_max_batch") or 0))
        ),
        "groups_one_by_one": request.default("latent_groups") == "one_by_one",
    }


def _context_is_of_one_sequence(request: _Request) -> bool:
    """Whether the context is one request's: so in a plain job. ``-c`` and a log's ``n_ctx`` are those of all slots."""
    if "n_ctx" in request.flags or _from_log(request) or request.typed:
        return False
    return request.job.max_num_seqs is not None and "kv_unified" not in request.flags


def _unified(request: _Request) -> bool:
    """Return whether all sequences share one cache when nothing is said of it."""
    value = request.default("kv_unified")
    if value == "if_auto":
        return "parallel" not in request.flags and request.job.max_num_seqs is None
    return bool(value)


def _caching(request: _Request) -> dict[str, Any]:
    """Return the settings of the cache."""
    job = request.job
    latent = any(isinstance(part, LatentAttention) for layer in job.model.layers for part in layer.mixers)
    cache_k = _cache_type(request.flags, "cache_type_k", job, "f16")
    return {
        "kv_unified": request.switch("kv_unified", _unified(request)),
        "cache_type_k": cache_k,
        "cache_type_v": _cache_type(request.flags, "cache_type_v", job, cache_k if job.kv_cache_dtype else "f16"),
        "mla": request.integer("mla") if latent and job.engine == "ik_llama.cpp" else 0,
        "latent_cache": _latent_cache(request) if latent else "",
        "window_cache": bool(request.default("window_cache")) and "swa_full" not in request.flags,
        "fit": _fits_itself(request),
    }


def _fits_itself(request: _Request) -> bool:
    """Return whether the start shrinks what was not typed: the context first, then the layers on devices.

    Source: llama-cpp-python@0.3.36:vendor/llama.cpp/common/fit.cpp:common_params_fit_impl (``--fit``, on by default).
    """
    typed = {"n_gpu_layers", "tensor_split", "override_tensor"} & set(request.flags)
    left = not typed or ("n_ctx" not in request.flags and request.job.max_model_len is None)
    return left and bool(request.default("fit_margin_mib")) and request.switch("fit", True)


def _flags(job: ServingJob) -> dict[str, list[str]]:
    """Return the job's flags by canonical name; a ``command`` or the native line is read as a command line."""
    from ullage.read.llamacpp_args import parse_command

    found: dict[str, list[str]] = {}
    command = next((value for name, value in job.flags if name == "command"), job.native)
    typed = parse_command(command).flags if command else ()
    for name, value in typed:
        found.setdefault(name, []).append(str(value))
    for raw, value in job.flags:
        name = raw.strip("-").replace("-", "_")
        name = _ALIASES.get(name, name)
        if name != "command" and not (name in found and name == "override_tensor" and typed):
            found[name] = [*found.get(name, []), str(value)] if name == "override_tensor" else [str(value)]
    return found


def _gpu_layers(job: ServingJob, flags: dict[str, list[str]], num_devices: int, assumed: list[str]) -> int:
    """Return the layers on devices: ``-ngl``, or the log's ``offloaded k/n``; all of them when nothing is said."""
    every = len(job.model.layers) + 1
    if num_devices == 0:
        return 0
    if "offloaded" in flags:
        match = re.match(r"\s*(\d+)\s*(?:/|of)\s*(\d+)", flags["offloaded"][-1])
        if match:
            return min(int(match[1]), every)
    value = flags.get("n_gpu_layers", [""])[-1]
    if value in ("", "auto", "all", "-1"):
        if not value:
            assumed.append(_("all layers on the devices: -ngl was not given"))
        return every
    return min(integer("n_gpu_layers", value), every)


def _flash(request: _Request) -> bool:
    """Return whether flash attention runs. "auto" turns it on wherever a device supports it, which CUDA does.

    Source: ollama/ollama@v0.15.0:ml/backend/ggml/ggml/src/ggml-cuda/fattn.cu:ggml_cuda_get_best_fattn_kernel (the
    vendored llama.cpp): no kernel where keys and values of a head differ in size, but for the latent's 576 and 512.
    """
    value: Any = request.flags.get("flash_attn", [None])[-1]
    if "no_flash_attn" in request.flags:
        return False
    if value is None:
        value = default(request.job.engine, "flash_attention", request.day)
        request.assumed.append(_("flash attention {value}, the default of {day}").format(value=value, day=request.day))
    if str(value).lower() == "auto" and request.job.engine != "ik_llama.cpp" and _unequal_heads(request):
        request.assumed.append(_("flash attention stays off: keys and values of a head differ in size"))
        return False
    return str(value).lower() not in _OFF


def _unequal_heads(request: _Request) -> bool:
    """Return whether latent attention is cached expanded to heads whose keys are longer than their values."""
    mixers = [part for layer in request.job.model.layers for part in layer.mixers]
    latent = [part for part in mixers if isinstance(part, LatentAttention)]
    unequal = any(part.qk_nope_head_dim + part.qk_rope_head_dim != part.v_head_dim for part in latent)
    return unequal and default(request.job.engine, "latent_cache", request.day) == "expanded"


def _latent_cache(request: _Request) -> str:
    """Return what the cache of latent attention holds; pull request 11446 keeps the latent transposed too."""
    if request.job.engine == "llamacpp" and "11446" in request.job.engine_version:
        return "key_and_value"
    return str(request.default("latent_cache"))


def _cache_type(flags: dict[str, list[str]], name: str, job: ServingJob, fallback: str) -> str:
    value = flags.get(name, [job.kv_cache_dtype or ""])[-1] or fallback
    if value == "auto":
        value = "f16"
    return ggml_type({"bfloat16": "bf16", "float16": "f16", "float32": "f32"}.get(value, value)).name


def _split(flags: dict[str, list[str]]) -> tuple[float, ...] | None:
    value = flags.get("tensor_split", [""])[-1]
    if not value:
        return None
    try:
        parts = tuple(float(part) for part in re.split(r"[,/;]", value.strip("[]() ")))
    except ValueError as error:
        raise InputError(_("{value!r} is not a list of shares").format(value=value[:80])) from error
    if any(part < 0 for part in parts):
        raise LayoutError(_("the shares of -ts must not be negative"))
    return parts if sum(parts) > 0 else None
