"""The pool of recurrent states (Mamba, gated delta net): slots beside the cache of keys and values."""

from __future__ import annotations

import math
from fractions import Fraction

from ullage.account.state import state_tensors
from ullage.engines.sglang.defaults import Settings
from ullage.frozen import Frozen
from ullage.spec import model as spec
from ullage.units import dtype_bytes

_CONV_DTYPE, _RECURRENT_DTYPE = "bfloat16", "float32"


class States(Frozen):
    """``slots`` of ``slot_bytes`` (one more for padding), and what drafts need while they are checked.

    ``max_requests``: requests that the slots allow, None without states.
    """

    slots: int = 0
    slot_bytes: int = 0
    num_bytes: int = 0
    max_requests: int | None = None


def slot_bytes(settings: Settings, layers: tuple[spec.Layer, ...]) -> int:
    """Return the state of one request on one rank.

    Formula: sum over layers of prod(shape) x e; e of the convolution 2 (bf16), of the recurrent state 4 (fp32) unless
        ``--mamba-ssm-dtype`` says otherwise.
    Source: sglang@0.5.23:srt/configs/mamba_utils.py:Mamba2StateDType, mamba_cache_per_req.
    """
    asked = settings.flags.text("mamba_ssm_dtype")
    total = Fraction(0)
    for layer in layers:
        for mixer in layer.mixers:
            for tensor in state_tensors(mixer, settings.attention_tp):
                usual = _CONV_DTYPE if tensor.name == "conv" else asked or tensor.dtype or _RECURRENT_DTYPE
                total += tensor.num_elements * dtype_bytes(usual)
    return math.ceil(total)


def states_of(settings: Settings, layers: tuple[spec.Layer, ...], available: int) -> States:
    """Return the state pool of a stage that has ``available`` bytes for states and cache.

    Formula: slots = available x r / (1 + r) // bytes per request; with drafts // (bytes x (1 + t / n)).
    Symbols: r mamba_full_memory_ratio (0.9), t draft tokens, n slots per request.
    Source: sglang@0.5.23:srt/mem_cache/kv_cache_configurator.py:_handle_max_mamba_cache;
        sglang@0.5.5.post3:srt/model_executor/model_runner.py:handle_max_mamba_cache.
    """
    each = slot_bytes(settings, layers)
    if not each:
        return States()
    rule = settings.release.rule("state")
    per_request = 1 if settings.flags.on("disable_radix_cache") else int(rule["slots_per_request"])
    padding = int(rule["padding_slots"])
    given = settings.flags.integer("max_mamba_cache_size")
    drafts = settings.draft_tokens
    if given is not None:
        slots = given // settings.attention_dp
    elif rule["rule"] == "slots" or (settings.flags.on("disable_radix_cache") and settings.max_running):
        slots = settings.max_running or int(rule["slots"])
    else:
        ratio = settings.flags.number("mamba_full_memory_ratio") or float(rule["full_memory_ratio"])
        budget = max(available, 0) * ratio / (1 + ratio)
        slots = max(int(budget // (each * (1 + drafts / per_request))) - padding, 0)
    requests = min(slots // per_request, settings.max_running or slots)
    intermediate = (requests + padding) * each * drafts
    return States(
        slots=slots,
        slot_bytes=each,
        num_bytes=(slots + padding) * each + intermediate,
        max_requests=slots // per_request,
    )
