"""The head: final norm, logits, cross entropy; what they keep and what they need for a moment.

Legend: T tokens of a micro-batch on the rank, V padded vocabulary, t tensor-parallel size.
"""

from __future__ import annotations

from ullage.engines.megatron.defaults import Settings
from ullage.engines.megatron.shape import Sizes
from ullage.ledger import Term, exact, ranged
from ullage.numeric import smaller
from ullage.spec.training import TrainingJob, is_headless
from ullage.units import tensor_bytes

PLAIN = "Megatron-LM@adc69db:megatron/core/tensor_parallel/cross_entropy.py:_VocabParallelCrossEntropy"
NATIVE = "Megatron-LM@adc69db:megatron/core/fusions/fused_cross_entropy.py:_VocabParallelCrossEntropy"
TE = "TransformerEngine@v2.11:transformer_engine/pytorch/triton/cross_entropy.py:cross_entropy_forward"


def head_saved_bytes(job: TrainingJob, sizes: Sizes) -> int:
    """Final norm's input and output: n*h each; BERT's head has a linear, its activation and a norm of its own besides.

    Source: Megatron-LM@adc69db:megatron/core/models/bert/bert_lm_head.py:BertLMHead.forward.
    """
    own_head = any(extra.name.startswith("lm_head.dense") for extra in job.model.extras)
    return (5 if own_head else 2) * tensor_bytes(
        sizes.decoder().stream_tokens * job.model.hidden_size, job.precision.compute
    )


def logits_elements(job: TrainingJob, sizes: Sizes) -> int:
    """Logits of one micro-batch on one rank: T * V/t; a scalar head's scores are whole on every rank.

    Source: mcore-bridge@1.6.5:model/gpt_model.py:GPTModel.__init__ (OutputLayerLinear, duplicated).
    """
    if is_headless(job):
        return sizes.decoder().tokens
    return sizes.decoder().tokens * -(-sizes.vocab_size // sizes.tensor)


def loss_peak(job: TrainingJob, settings: Settings, sizes: Sizes) -> Term:
    """Logits and cross entropy at their peak.

    Formula: plain (2+4)*T*V/t: logits in the compute format stay with the caller while their fp32 copy becomes the
        softmax in place; backward holds the softmax and its 16-bit cast, as much. Transformer Engine's works in place:
        2*T*V/t, and as much for a gradient that the framework scales. The native fusion is compiled: forward works in
        place as the plain one; the backward's indexed update makes a copy of the softmax, and beside both stands the
        16-bit gradient: (4+4+2)*T*V/t. Before PyTorch 2.6 the first call clones what a kernel writes in place, to
        try its configurations: 4*T*V/t more until a later start finds them on disk.
    Source: PLAIN, NATIVE and TE as named on the term; torch@2.13.0:torch/_inductor/runtime/triton_heuristics.py:
        CachingAutotuner.copy_args_to_cpu_if_needed. Known error: compiled, one fp32 copy more or less.
    """
    elements = logits_elements(job, sizes)
    width = tensor_bytes(1, job.precision.compute)
    if settings.fused_loss == "te":
        return ranged(
            "logits_and_loss",
            width * elements,
            low=width * elements,
            high=2 * width * elements,
            formula=f"{width}*T*V/t",
            source=TE,
        )
    peak = (4 + width) * elements if width < 4 else 2 * width * elements
    if settings.fused_loss == "native":
        peak += 4 * elements
        return ranged(
            "logits_and_loss",
            peak,
            low=peak - 4 * elements if settings.flags.get("native") == "true" else width * elements,
            high=peak + 4 * elements,
            formula="(4+4+2)*T*V/t",
            source=NATIVE,
        )
    return exact("logits_and_loss", peak, formula=f"({width}+4)*T*V/t", source=PLAIN)


def head_backward(job: TrainingJob, sizes: Sizes) -> Term:
    """The output layer's backward: gradient of the logits, of the weight and of its input.

    Formula: 2 * (T*V/t + V/t*h + T*h); a frozen head's weight has none. With fused accumulation the weight's gradient
        is an empty tensor of its size.
    Source: Megatron-LM@adc69db:megatron/core/tensor_parallel/layers.py:
        LinearWithGradAccumulationAndAsyncCommunication.backward.
    """
    hidden = job.model.hidden_size
    rows = -(-sizes.vocab_size // sizes.tensor)
    weight = 0 if job.lora is not None or is_headless(job) else rows * hidden
    elements = logits_elements(job, sizes) + weight + sizes.decoder().tokens * hidden
    return exact(
        "head_backward",
        tensor_bytes(elements, job.precision.compute),
        formula="2*(T*V/t + V/t*h + T*h)",
        source="Megatron-LM@adc69db:megatron/core/tensor_parallel/layers.py",
    )


def deferred_bytes(job: TrainingJob, settings: Settings, sizes: Sizes) -> int:
    """Inputs and output gradients that a deferred head gradient keeps, for ``--wgrad-deferral-limit`` micro-batches.

    Formula: min(limit or all, micro-batches) * 2 bytes * (T*V/t + n*h).
    Source: Megatron-LM@adc69db:megatron/core/tensor_parallel/layers.py:LinearWithGradAccumulationAndAsyncCommunication.
    """
    if not settings.on("defer-embedding-wgrad-compute"):
        return 0
    number = smaller(settings.count("wgrad-deferral-limit", 0) or job.grad_accum, job.grad_accum)
    elements = logits_elements(job, sizes) + sizes.stream_tokens * job.model.hidden_size
    return number * tensor_bytes(elements, job.precision.compute)


def batch_bytes(job: TrainingJob, settings: Settings, sizes: Sizes) -> int:
    """A micro-batch on the device: ids, labels, positions (int64), loss mask (fp32) and the causal mask (bool).

    Formula: 28*b*s/c + b*s*s/c; the loss keeps labels and masks once more: 40*b*s/c.
    Source: Megatron-LM@adc69db:megatron/training/utils.py:get_batch_on_this_tp_rank.
    """
    ids = 68 * sizes.tokens
    if settings.flags.get("native") != "true" or settings.on("no-create-attention-mask-in-dataloader"):
        return ids
    return ids + sizes.tokens * sizes.seq_len
