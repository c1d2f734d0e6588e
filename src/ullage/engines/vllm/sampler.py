"""The sampler of the profiling run: which path it takes, and what that holds for each logit."""

from __future__ import annotations

import re

from ullage.engines.vllm.defaults import Setup
from ullage.engines.vllm.runner import second_runner
from ullage.frozen import Frozen
from ullage.units import dtype_bytes

#: Bytes for each logit at the widest moment of a path of the first runner; see :func:`sampler_bytes`.
SORT_BYTES_EACH, IN_PLACE_BYTES_EACH = 38, 14
_IMAGE = re.compile(r"\bimage\b|vllm-openai|\bdocker|\.nv\d\d", re.IGNORECASE)
_OPEN_ENDED = re.compile(r"or (?:later|newer)|\+\s*$", re.IGNORECASE)


class SamplerPath(Frozen):
    """A path of the sampler.

    Attributes:
        name: ``sort``, ``in_place`` (the in-place kernel and FlashInfer) or ``gumbel`` (the second runner).
        each, low, high: bytes for each logit: expected, and by the other paths that may be taken.
    """

    name: str
    each: float
    low: float
    high: float


def flashinfer_installed(setup: Setup) -> bool:
    """Tell whether a version that takes FlashInfer where it finds it finds it: the container images have it.

    ``pip install vllm`` leaves it out up to 0.11.0 (an extra). A version "N or later" is N in one case of many, and
    the later ones do not sample by FlashInfer before 0.21.

    Source: vllm@0.11.0:setup.py (extras), docker/Dockerfile (installs FlashInfer).
    """
    text = setup.job.engine_version
    return bool(_IMAGE.search(text)) and not _OPEN_ENDED.search(re.sub(r"\(.*?\)", "", text).strip())


def sampler_path(setup: Setup) -> SamplerPath:
    """Return the path of the dummy sampler run.

    Source: vllm@0.10.1.1, vllm@0.11.1, vllm@0.21.0:vllm/v1/sample/ops/topk_topp_sampler.py:TopKTopPSampler.__init__
        (FlashInfer where importable up to 0.11.0; where VLLM_USE_FLASHINFER_SAMPLER says so up to 0.20; then by
        default), vllm@0.17.0: the same file, apply_top_k_top_p (in place where Triton is); vllm@0.29.0:
        vllm/v1/worker/gpu/sample/sampler.py:Sampler.sample (the second runner).
    """
    sort, in_place = float(SORT_BYTES_EACH), float(IN_PLACE_BYTES_EACH)
    if setup.version.engine == "V1" and second_runner(setup):
        each = _gumbel_bytes_each(setup)
        return SamplerPath(name="gumbel", each=each, low=2.0, high=max(each, 6.0))
    rule = str(setup.version.setting("sampler")) if setup.version.engine == "V1" else "sort"
    flag = setup.flag("VLLM_USE_FLASHINFER_SAMPLER") or setup.flag("vllm_use_flashinfer_sampler")
    if flag:
        each = sort if flag.lower() in ("0", "false") else in_place
        return SamplerPath(name="sort" if each == sort else "in_place", each=each, low=each, high=each)
    if "native" in setup.flag("sampler").lower():
        return SamplerPath(name="sort", each=sort, low=sort, high=sort)
    if "flashinfer" in setup.flag("sampler").lower():
        return SamplerPath(name="in_place", each=in_place, low=in_place, high=in_place)
    if setup.job.machine.gpu.vendor != "nvidia":  # the in-place kernel is Triton's, from 0.17 on; aiter may sample
        each = in_place if setup.version.at_least("0.17.0") else sort
        return SamplerPath(name="sort" if each == sort else "in_place", each=each, low=in_place, high=each)
    if rule == "flashinfer_if_installed":
        each = in_place if flashinfer_installed(setup) else sort
        return SamplerPath(name="sort" if each == sort else "in_place", each=each, low=in_place, high=sort)
    each = sort if rule == "sort" else in_place
    # NVIDIA's containers may set the variable that switches FlashInfer's sampler on.
    low = in_place if re.search(r"\.nv\d\d", setup.job.engine_version) else each
    return SamplerPath(name="sort" if each == sort else "in_place", each=each, low=low, high=each)


def _gumbel_bytes_each(setup: Setup) -> float:
    """Return what the second runner holds of a logit.

    Formula: logits 2 (and a float32 copy 4 up to 0.25); gathered from t ranks: local part 2 / t, gathered 2, and the
        copy that puts the parts side by side 2.
    Source: vllm@0.25.0, vllm@0.26.0, vllm@0.29.0:vllm/v1/worker/gpu/sample/sampler.py:Sampler.apply_sampling_params,
        gumbel.py:gumbel_sample; vllm@0.29.0:vllm/distributed/device_communicators/cuda_communicator.py:all_gather.
    """
    held, tp = float(setup.version.setting("second_runner_logit_bytes")), setup.job.parallel.tensor_parallel_size
    return max(held, 4 + 2 / tp) if tp > 1 else held


def sampler_bytes(setup: Setup, each: float) -> int:
    """Return what the dummy sampler run holds at its peak, hidden states of the batch included.

    Formula: R x V x b + T x H x e + 2 x R x H x e.
        Sorting path, b = 38: logits in the model's dtype 2, in float32 4, sorted values 4 and indices 8, the indices
        sorted along 8, and the radix sort's second buffers for keys and values 4 + 8.
        In-place and FlashInfer paths, b = 14: logits 2 and 4, masked logits 4, probabilities 4.
        Second runner, b = 2 to 6: see :func:`_gumbel_bytes_each`.
    Symbols: R rows (max_num_seqs), V vocab_size, T tokens of the batch, H hidden_size, e bytes of an element; the
        last sum is the batch's hidden states, the rows taken from them and their random stand-in.
    Source: vllm@0.11.0:vllm/v1/worker/gpu_model_runner.py:_dummy_sampler_run, vllm/v1/sample/sampler.py:Sampler,
        vllm/v1/sample/ops/topk_topp_sampler.py:apply_top_k_top_p; cub::DeviceSegmentedRadixSort (no double buffer).
    Known error: under 1 % against published logs; fewer than 128 rows sort by another kernel.
    """
    model, tokens, rows = setup.job.model, setup.tokens, setup.rows
    element = int(dtype_bytes(setup.job.weights_dtype or model.dtype))
    hidden = (tokens + 2 * rows) * model.hidden_size * element
    return int(rows * model.vocab_size * each) + hidden
