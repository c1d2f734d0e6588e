"""What a vLLM version does when nothing is said: defaults by version, and the job with all of them filled in."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from ullage.errors import InputError
from ullage.frozen import Frozen
from ullage.i18n import _
from ullage.spec import model as spec
from ullage.spec.serving import ServingJob
from ullage.units import GiB, canonical_dtype

_FILE = Path(__file__).parents[2] / "catalog" / "engines" / "vllm.json"
_NUMBER = re.compile(r"(?<![\d.])v?(0\.\d+(?:\.\d+){0,2})")
_DATE = re.compile(r"(20\d\d)(?:-(\d\d))?(?:-(\d\d))?")


@lru_cache(maxsize=1)
def _catalog() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(_FILE.read_text(encoding="utf-8"))
    return loaded


@lru_cache(maxsize=1024)
def _key(version: str) -> tuple[int, ...]:
    parts = [int(part) for part in version.split(".")]
    return tuple(parts + [0] * (3 - len(parts)))


def _versions() -> tuple[str, ...]:
    return tuple(sorted(_catalog()["versions"]["values"], key=_key))


VERSIONS: tuple[str, ...] = _versions()


class Version(Frozen):
    """A vLLM version as understood.

    Attributes:
        number: of the release that is mirrored.
        assumed: sentences on how an imprecise version was read.
        warnings: sentences on a version that is newer than any that was read.
        v0: the engine generation was named V0 outright.
    """

    number: str
    assumed: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    v0: bool = False

    def setting(self, name: str) -> Any:
        """Return the value of a catalog setting at this version: the last one introduced."""
        value = None
        for entry in _catalog()["settings"][name]["values"]:
            if _key(entry["since"]) <= _key(self.number):
                value = entry["value"]
        if value is None:
            value = _catalog()["settings"][name]["values"][0]["value"]
        return value

    @property
    def engine(self) -> str:
        """``V0`` or ``V1``."""
        return "V0" if self.v0 else str(self.setting("engine"))

    def at_least(self, number: str) -> bool:
        """Tell whether this version is not older than ``number``."""
        return _key(self.number) >= _key(number)


@lru_cache(maxsize=256)
def read_version(text: str) -> Version:
    """Read a version: a number (``0.8.3.dev172``, ``0.6.x``), else a date, else the newest that is known."""
    v0 = "(V0)" in text
    match = _NUMBER.search(text)
    if match:
        number = match.group(1)
        newest = VERSIONS[-1]
        warnings: tuple[str, ...] = ()
        if _key(number)[:2] > _key(newest)[:2]:
            warnings = (
                _("vLLM {version} is newer than {newest}, whose rules are used").format(version=number, newest=newest),
            )
        exact = text.strip().lstrip("v") == number
        if "x" in text and re.search(re.escape(number) + r"\.x", text):
            number = [v for v in VERSIONS if _key(v)[:2] <= _key(number)[:2]][-1] if _older(number) else VERSIONS[0]
            exact = False
        assumed = () if exact else (_("version {text!r} read as vLLM {number}").format(text=text, number=number),)
        return Version(number=number, assumed=assumed, warnings=warnings, v0=v0)
    number = _by_date(text) or VERSIONS[-1]
    return Version(
        number=number, assumed=(_("version {text!r} read as vLLM {number}").format(text=text, number=number),), v0=v0
    )


def _older(number: str) -> bool:
    return any(_key(version)[:2] <= _key(number)[:2] for version in VERSIONS)


def _by_date(text: str) -> str | None:
    """Return the newest known version released by the date in ``text``; a bare year or month says its middle."""
    match = _DATE.search(text)
    if match is None:
        return None
    year, month, day = match.groups()
    date = f"{year}-{month}-{day or '15'}" if month else f"{year}-07-01"
    released = [version for version in VERSIONS if _catalog()["versions"]["values"][version] <= date]
    return released[-1] if released else VERSIONS[0]


class Setup(Frozen):
    """A job with every default filled in, and what the version does with it.

    Attributes:
        job: all of ``max_model_len``, ``max_num_seqs``, ``max_num_batched_tokens``, ``memory_fraction``,
            ``enforce_eager``, ``block_size``, ``kv_cache_dtype`` and ``weights_dtype`` are set.
        auto_length: ``max_model_len`` was -1: the engine shortens it until it fits.
        chunked_prefill: prompts longer than the batch are cut.
        total_bytes: (low, expected, high) of the device's total.
        multimodal: the towers are built, profiled and served.
        tokens_high: tokens of the profiling run at most: where the default was taken, an offline ``LLM`` has more.
    """

    job: ServingJob
    version: Version
    auto_length: bool
    chunked_prefill: bool
    prefix_caching: bool
    total_bytes: tuple[int, int, int]
    multimodal: bool
    pooling: bool
    tokens_high: int
    warnings: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens of the profiling run."""
        return self.job.max_num_batched_tokens or 1

    @property
    def rows(self) -> int:
        """Sequences of the profiling run, hence rows of logits."""
        return min(self.job.max_num_seqs or 1, self.tokens)

    def flag(self, name: str, default: str = "") -> str:
        """Return a flag of the job as typed."""
        return dict(self.job.flags).get(name, default)

    def truth(self, name: str, default: bool) -> bool:
        """Return a flag as a truth value."""
        return _truth(dict(self.job.flags).get(name), default)


def _truth(text: str | None, default: bool) -> bool:
    return default if text is None else str(text).lower() in ("true", "1", "yes", "on", "")


def total_bytes(job: ServingJob) -> tuple[int, int, int]:
    """Return (low, expected, high) of one device's total."""
    if job.device_total_bytes:
        return job.device_total_bytes, job.device_total_bytes, job.device_total_bytes
    gpu = job.machine.gpu
    return gpu.total_low_bytes, gpu.total_bytes, gpu.total_high_bytes


def has_state(model: spec.Model) -> bool:
    """Tell whether the model has state layers beside attention."""
    attention = (spec.Attention, spec.LatentAttention, spec.CompressedAttention)
    return any(not isinstance(mixer, attention) for layer in model.layers for mixer in layer.mixers)


def _caches_prefixes(version: Version, model: spec.Model) -> bool:
    """Tell whether prefixes are cached by default: in V1 by decoders, by hybrids later, by pure state models never."""
    if version.engine != "V1" or not has_state(model):
        return version.engine == "V1"
    attention = (spec.Attention, spec.LatentAttention, spec.CompressedAttention)
    return bool(version.setting("prefix_caching_hybrid")) and any(isinstance(one, attention) for one in _mixers(model))


def resolve(job: ServingJob) -> Setup:
    """Fill in what the job leaves to the engine (see the module).

    Source: vllm@0.33.0:vllm/engine/arg_utils.py:EngineArgs.create_engine_config, and the catalog's entries.

    Raises:
        InputError: a value that the engine refuses.
    """
    version = read_version(job.engine_version)
    flags = dict(job.flags)
    assumed = list(job.assumed) + list(version.assumed)
    length, auto = _max_model_len(job, assumed)
    pooling = flags.get("runner") == "pooling" or flags.get("task") in ("embed", "classify", "score", "reward")
    chunked = _chunked_prefill(version, flags, length, pooling)
    tokens, seqs = _batch(job, version, length, chunked, assumed)
    fraction = _memory_fraction(job, version, assumed)
    assumed += _sampler_assumed(version, flags)
    dtype = _weights_dtype(job)
    filled = replace(
        job,
        max_model_len=length,
        max_num_seqs=seqs,
        max_num_batched_tokens=tokens,
        memory_fraction=fraction,
        enforce_eager=bool(job.enforce_eager),
        weights_dtype=dtype,
        kv_cache_dtype=cache_dtype(job, version, dtype),
        block_size=block_size(job, version),
        assumed=tuple(assumed),
    )
    return Setup(
        job=filled,
        version=version,
        auto_length=auto,
        chunked_prefill=chunked,
        prefix_caching=_truth(flags.get("enable_prefix_caching"), _caches_prefixes(version, job.model)),
        total_bytes=total_bytes(job),
        multimodal=bool(job.model.towers) and not towers_left_out(flags),
        pooling=pooling,
        tokens_high=max(tokens, _offline_tokens(job, version, length, chunked)),
        warnings=version.warnings,
    )


def _sampler_assumed(version: Version, flags: dict[str, str]) -> list[str]:
    """Return what is assumed of the sampler where a package decides and the job does not say.

    Source: vllm@0.10.1.1:vllm/v1/sample/ops/topk_topp_sampler.py (FlashInfer where it is installed),
        setup.py (an extra that ``pip install vllm`` leaves out), docker/Dockerfile (the image has it).
    """
    decided = any(name.lower() in ("vllm_use_flashinfer_sampler", "sampler") for name in flags)
    if decided or version.engine != "V1" or version.setting("sampler") != "flashinfer_if_installed":
        return []
    return [_("FlashInfer is not installed, so that sampling sorts all logits (the container image has it)")]


def _memory_fraction(job: ServingJob, version: Version, assumed: list[str]) -> float:
    fraction = job.memory_fraction
    if fraction is None:
        fraction = float(version.setting("gpu_memory_utilization"))
        assumed.append(_("gpu_memory_utilization {value}, the default").format(value=fraction))
    if not 0 < fraction <= 1:
        raise InputError(_("gpu_memory_utilization {value} is not in (0, 1]").format(value=fraction))
    return fraction


def towers_left_out(flags: dict[str, str]) -> bool:
    """Tell whether no image, video or audio may be given: newer versions then do not build the encoder."""
    if _truth(flags.get("language_model_only"), False):
        return True
    limits = re.findall(r":\s*(\d+)", flags.get("limit_mm_per_prompt", ""))
    return bool(limits) and all(int(limit) == 0 for limit in limits)


def _max_model_len(job: ServingJob, assumed: list[str]) -> tuple[int, bool]:
    declared = job.model.max_position_embeddings or 2048
    if job.max_model_len is None:
        assumed.append(_("max_model_len {value}, from the model's config").format(value=declared))
        return declared, False
    if job.max_model_len == -1:
        return declared, True
    if job.max_model_len < 1:
        raise InputError(_("max_model_len {value} is not a length").format(value=job.max_model_len))
    return job.max_model_len, False


def _chunked_prefill(version: Version, flags: dict[str, str], length: int, pooling: bool) -> bool:
    """V1 always cuts prompts (not for pooling of old); V0 does above 32k tokens of context."""
    default = True if version.engine == "V1" else length > int(version.setting("long_context_tokens")) and not pooling
    return _truth(flags.get("enable_chunked_prefill"), default)


def _batch(job: ServingJob, version: Version, length: int, chunked: bool, assumed: list[str]) -> tuple[int, int]:
    """Return max_num_batched_tokens and max_num_seqs."""
    tokens, seqs = _batch_defaults(job, version, length, chunked)
    if job.max_num_batched_tokens is not None:
        tokens = job.max_num_batched_tokens
    else:
        if not chunked:
            tokens = max(tokens, length)
        if version.engine == "V1" and job.max_num_seqs is not None and version.at_least("0.10.0"):
            tokens = min(max(tokens, job.max_num_seqs), max(tokens, length * job.max_num_seqs))
        assumed.append(_("max_num_batched_tokens {value}, the default").format(value=tokens))
    if job.max_num_seqs is not None:
        seqs = job.max_num_seqs
    else:
        seqs = min(seqs, tokens)
        assumed.append(_("max_num_seqs {value}, the default").format(value=seqs))
    if tokens < 1 or seqs < 1:
        raise InputError(_("max_num_batched_tokens and max_num_seqs must be at least 1"))
    return tokens, seqs


def _batch_defaults(job: ServingJob, version: Version, length: int, chunked: bool) -> tuple[int, int]:
    """Return the version's defaults for this device, for the API server (``usage=llm`` in the flags: offline).

    GB10 has the small defaults: NVML does not say its memory, which counts as none; 0.33 leaves it there by name.

    Source: vllm@0.33.0:vllm/engine/arg_utils.py:EngineArgs.get_batch_defaults;
        vllm@0.8.5:vllm/engine/arg_utils.py:EngineArgs._set_default_args_v1; vllm@0.6.4:vllm/config.py:SchedulerConfig;
        vllm@0.32.0:vllm/platforms/cuda.py:NvmlCudaPlatform.get_device_total_memory (an error on GB10, caught there).
    """
    if version.engine == "V0":
        tokens = int(version.setting("chunked_prefill_tokens")) if chunked else max(length, 2048)
        return tokens, int(version.setting("v0_max_num_seqs"))
    offline = dict(job.flags).get("usage") == "llm"
    rule, name, memory = str(version.setting("batch_tiers")), job.machine.gpu.name.lower(), total_bytes(job)[1]
    if rule == "h100_by_name":
        large = "h100" in name or "h200" in name
        return (16384 if offline else 8192) if large else (8192 if offline else 2048), 1024
    if rule.startswith("from_160_gib") and memory >= 160 * GiB:
        return 16384, 1024
    large = memory >= 70 * GiB and (rule == "from_70_gib" or "a100" not in name)
    if job.machine.gpu.compute_capability == (12, 1):
        large = False
    if large:
        return (16384 if offline else 8192), 1024
    return (8192 if offline else 2048), 256


def _offline_tokens(job: ServingJob, version: Version, length: int, chunked: bool) -> int:
    if job.max_num_batched_tokens is not None:
        return job.max_num_batched_tokens
    return _batch_defaults(replace(job, flags=(*job.flags, ("usage", "llm"))), version, length, chunked)[0]


def _weights_dtype(job: ServingJob) -> str:
    """Return the dtype of what is not quantised: as asked, else the checkpoint's, float32 halved."""
    asked = job.weights_dtype
    dtype = canonical_dtype(asked if asked and asked != "auto" else job.model.dtype)
    if (not asked or asked == "auto") and dtype == "float32":
        return "float16"
    return dtype


def _mixers(model: spec.Model) -> list[spec.Mixer]:
    return list({id(mixer): mixer for layer in model.layers for mixer in layer.mixers}.values())


def cache_dtype(job: ServingJob, version: Version, dtype: str) -> str:
    """Return the format of the KV cache: a plain dtype, ``fp8_ds_mla``, ``nvfp4`` ...

    ``auto`` is the checkpoint's own cache dtype if it names one, else the weights' dtype. Sparse latent attention
    (V3.2) and V4 keep fp8 in the packed ``fp8_ds_mla`` row; V3.2 took it for ``auto`` too up to 0.13, V4 always.

    Source: vllm@0.33.0:vllm/model_executor/layers/attention/mla_attention.py:_canonicalize_sparse_mla_kv_cache_dtype;
        vllm@0.11.0:vllm/model_executor/models/config.py:DeepseekV32ForCausalLM.
    """
    asked = (job.kv_cache_dtype or "auto").lower()
    kinds = _mixers(job.model)
    sparse = any(isinstance(mixer, spec.LatentAttention) and (mixer.indexer or mixer.shared_indexer) for mixer in kinds)
    packed = any(isinstance(mixer, spec.CompressedAttention) for mixer in kinds)
    stored = job.model.quantization.kv_cache_dtype if job.model.quantization else None
    if asked == "auto":
        if packed or (sparse and not version.at_least("0.14.0")):
            return "fp8_ds_mla"
        return canonical_dtype(stored) if stored else dtype
    if asked.startswith("fp8") and (packed or sparse):
        return "fp8_ds_mla"
    if asked.endswith("_ds_mla") or asked.startswith("nvfp4") or asked.endswith("_per_token_head"):
        return asked
    return canonical_dtype("fp8" if asked == "fp8" else asked)


def block_size(job: ServingJob, version: Version) -> int:
    """Return the tokens of a cache block before hybrid alignment.

    Source: vllm@0.33.0:vllm/platforms/interface.py:update_block_size_for_backend (FlashMLA 64, FlashInfer MLA 64,
        CUTLASS MLA 128, sparse MLA 64, V4 256); vllm@0.8.5:vllm/platforms/cuda.py:check_and_update_config.
    """
    if job.block_size is not None:
        return job.block_size
    kinds = _mixers(job.model)
    if any(isinstance(mixer, spec.CompressedAttention) for mixer in kinds):
        return 256
    if any(isinstance(mixer, spec.LatentAttention) for mixer in kinds) and version.setting("mla"):
        major = (job.machine.gpu.compute_capability or (0, 0))[0]
        if major == 9:
            return 64
        if major == 10:
            return 128 if not version.at_least("0.11.0") else 64
    return int(version.setting("block_size"))
