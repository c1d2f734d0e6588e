"""Experts under a quantised base: from transformers 5 on they are stacked tensors, which bitsandbytes passes over."""

from __future__ import annotations

from ullage.engines.hf_trainer.defaults import GROUPED_EXPERTS, NEWEST, transformers_version
from ullage.i18n import _
from ullage.spec import model as spec
from ullage.spec.training import TrainingJob
from ullage.units import dtype_bytes

BITSANDBYTES = ("nf4", "fp4", "int8")
#: Routed experts, not the shared one.
ROUTED = r"(?:^|\.)experts\."


def are_stacked(job: TrainingJob) -> bool:
    """Return whether a bitsandbytes base has its routed experts in stacked tensors.

    Source: transformers@5.23.0:integrations/bitsandbytes.py:replace_with_bnb_linear (nn.Linear alone),
        integrations/moe.py:use_experts_implementation; @4.57.1: experts are lists of nn.Linear.
    """
    if job.base_quantization not in BITSANDBYTES:
        return False
    if dict(job.flags).get("experts") == "linear":  # axolotl's llama4_linearized_experts
        return False
    version = transformers_version(job.engine_version) or NEWEST
    return version >= GROUPED_EXPERTS and any(_routed(layer) for layer in job.model.layers)


def stay_wide(job: TrainingJob) -> bool:
    """Return whether stacked experts stay as they were loaded; Axolotl quantises them while it loads, where asked to.

    Source: axolotl@067b021c:src/axolotl/monkeypatch/moe_quant.py:patch_moe_quantization_on_load
        (quantize_moe_experts), loaders/model.py:_prepare_model_for_quantization.
    """
    stated = dict(job.flags).get("experts")
    quantised = "axolotl" in job.engine_version.lower() if stated is None else stated == "quantised"
    return are_stacked(job) and not quantised


def said(job: TrainingJob) -> tuple[str, ...]:
    """Return what is assumed of the experts under a quantised base."""
    if not are_stacked(job):
        return ()
    if stay_wide(job):
        return (_("routed experts are stacked tensors, which bitsandbytes does not quantise: they stay in 16 bits"),)
    return (_("routed experts are quantised while they are loaded (quantize_moe_experts)"),)


def widened_elements(job: TrainingJob) -> int:
    """Return the elements of stacked experts, which k-bit preparation makes fp32 with all else that is 16-bit.

    Source: peft@0.19.1:utils/other.py:prepare_model_for_kbit_training.
    """
    return sum(_elements(layer, job.model.hidden_size) for layer in job.model.layers) if stay_wide(job) else 0


def dequantised_bytes(job: TrainingJob, layer: spec.Layer) -> int:
    """Return what one layer's quantised stacks take while they are whole.

    Formula: both stacks, kept for the gradient of the layer's input: in 8 bits as fp32 (values times fp32 scales), in
        4 bits in the compute dtype.
    Source: axolotl@067b021c:src/axolotl/monkeypatch/moe_quant.py:Bnb8bitParametrization, replace_parameter_8bit
        (cached while the module runs); bitsandbytes@0.49.0:backends/default/ops.py (int8_vectorwise_dequant).
    """
    if not are_stacked(job) or stay_wide(job):
        return 0
    width = 4 if job.base_quantization == "int8" else dtype_bytes(job.precision.compute)
    return int(_elements(layer, job.model.hidden_size) * width)


def _routed(layer: spec.Layer) -> list[spec.MoEFFN]:
    return [ffn for ffn in layer.ffns if isinstance(ffn, spec.MoEFFN)]


def _elements(layer: spec.Layer, hidden_size: int) -> int:
    return sum(
        ffn.num_experts * (ffn.latent_size or hidden_size) * ffn.intermediate_size * (3 if ffn.gated else 2)
        for ffn in _routed(layer)
    )
