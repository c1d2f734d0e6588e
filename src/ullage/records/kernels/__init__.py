"""Kernel records: one kernel or small module of a benchmark table → its peak.

The table's script is written down (what is made before, what an iteration does) and runs on a tape of sizes.
"""

from __future__ import annotations

from collections.abc import Callable

from ullage.account.kernels.tape import Tape
from ullage.engines.serving import Amount
from ullage.i18n import _
from ullage.records.compare import NotComparableError, Prediction
from ullage.records.kernels import blocks, heads, layers, losses
from ullage.records.kernels.case import Case, Trial, peak_bytes
from ullage.records.schema import Record
from ullage.units import MiB

#: How far a count of live tensors may be off: a cached block of another size, small statistics.
MARGIN = 0.03
PROVIDERS = ("huggingface", "torch", "torch_compile", "megatron", "deepspeed_tiled")

SCRIPTS: dict[str, Callable[[Case, Tape], Trial]] = {
    "cross_entropy": losses.cross_entropy,
    "kl_div": losses.kl_div,
    "jsd": losses.jsd,
    "tvd": losses.tvd,
    "megatron_cross_entropy": losses.megatron_cross_entropy,
    "fused_linear_cross_entropy": heads.cross_entropy,
    "fused_linear_jsd": heads.jsd,
    "fused_linear_orpo_loss": heads.preference,
    "fused_linear_cpo_loss": heads.preference,
    "fused_linear_simpo_loss": heads.preference,
    "fused_linear_grpo_loss_token": heads.policy,
    "fused_linear_grpo_loss_sequence": heads.policy,
    "distill_jsd_loss": heads.distillation,
    "distill_cosine_loss": heads.distillation,
    "rms_norm": layers.rms_norm,
    "megatron_rms_norm": layers.megatron_rms_norm,
    "fused_add_rms_norm": layers.fused_add_rms_norm,
    "layer_norm": layers.layer_norm,
    "group_norm": layers.group_norm,
    "dyt": layers.dyt,
    "poly_norm": layers.poly_norm,
    "softmax": layers.softmax,
    "relu_squared": layers.relu_squared,
    "sparsemax": layers.sparsemax,
    "rope": layers.rope,
    "llama4_rope": layers.llama4_rope,
    "swiglu": blocks.gated,
    "geglu": blocks.gated,
    "tiled_swiglu": blocks.gated,
    "tiled_geglu": blocks.gated,
    "megatron_swiglu": blocks.megatron_swiglu,
    "fused_moe": blocks.fused_moe,
    "embedding": blocks.embedding,
    "moe_layer": blocks.moe_layer,
}
#: Kernels that have a program for modules that went through ``torch.compile``.
COMPILED = ("dyt", "embedding")


def predict(record: Record) -> Prediction:
    """Predict a kernel record.

    Raises:
        NotComparableError: the kernel or its provider is not counted, or the figure cannot be the kernel's.
    """
    case = Case(record)
    script = SCRIPTS.get(case.kernel)
    if script is None or not case.params or not _known(case):
        raise case.not_counted()
    tape = Tape(case.device)
    trial = script(case, tape)
    value = peak_bytes(tape, trial, case.mode)
    if any(figure.value < value / 5 for figure in record.measured):
        raise NotComparableError(_("the figure is below the size of the kernel's own input"))
    margin = round(value * MARGIN) + MiB
    amount = Amount(value=value, low=value - margin, high=value + margin + trial.high_bytes)
    return Prediction(engine="kernels", figures={"max_allocated": amount})


def _known(case: Case) -> bool:
    """Return whether there is a program for a provider's kernel."""
    if case.compiled:
        return case.kernel in COMPILED
    return case.liger or case.provider in PROVIDERS or case.kernel.startswith(("megatron_", "moe_layer"))
