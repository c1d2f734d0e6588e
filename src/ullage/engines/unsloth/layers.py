"""What a layer keeps under Unsloth's kernels, and the fullest moments of its backward.

n tokens, h hidden size, I inner size; bytes in the compute dtype unless said.
"""

from __future__ import annotations

import math
from dataclasses import replace

from ullage.account.activations.backward import Point, backward_points
from ullage.account.activations.layer import layer_table
from ullage.account.activations.norms import norm_table
from ullage.account.activations.packed import written_out_points
from ullage.account.activations.recompute import LayerMemory
from ullage.account.activations.saved import Implementation, SavedTensor, Shape, table_bytes
from ullage.account.lora import adapter_table, layer_targets
from ullage.engines.hf_trainer.layers import Pass, micro_batch
from ullage.engines.unsloth.rules import Rules, precision_of
from ullage.frozen import Frozen
from ullage.spec import model as spec
from ullage.spec.training import Lora, TrainingJob
from ullage.units import dtype_bytes

Table = tuple[SavedTensor, ...]
#: Elements of a 4-bit weight that share a scale, which is written out in fp32 beside the weight.
#: Source: bitsandbytes@0.43.3:functional.py:quantize_4bit; unsloth@015bdef0:kernels/utils.py:fast_dequantize (absmax).
BLOCK = 64


class Fused(Frozen):
    """The names of the linear layers whose adapters run inside one of Unsloth's functions; ``mlp``: all of the block's.

    Source: unsloth@015bdef0:models/llama.py:FastLlamaModel.patch_peft_model: every linear of the group has an adapter
        and none a bias; no dropout, no DoRA.
    """

    names: tuple[str, ...]
    mlp: bool


def fused_of(layer: spec.Layer, hidden_size: int, lora: Lora) -> Fused:
    """Return which adapters of a layer are fused: LoRA_QKV, LoRA_W of the output projection, LoRA_MLP."""
    if lora.dropout or lora.dora:
        return Fused(names=(), mlp=False)
    adapted = {one.name.removesuffix(".weight") for one in layer_targets(layer, hidden_size, lora.targets)}
    found: list[str] = []
    for mixer in layer.mixers:
        if isinstance(mixer, spec.Attention):
            inner = tuple(f"{mixer.prefix}.{name}" for name in (mixer.q_name, mixer.k_name, mixer.v_name))
            plain = not (mixer.q_bias or mixer.k_bias or mixer.v_bias)
            found += inner if plain and adapted.issuperset(inner) else ()
            last = f"{mixer.prefix}.{mixer.o_name}"
            found += (last,) if last in adapted and not mixer.o_bias else ()
    whole = False
    for ffn in layer.ffns:
        if isinstance(ffn, spec.DenseFFN):
            names = tuple(f"{ffn.prefix}.{name}" for name in (ffn.gate_name, ffn.up_name, ffn.down_name))
            whole = ffn.gated and not ffn.bias and adapted.issuperset(names)
            found += names if whole else ()
    return Fused(names=tuple(found), mlp=whole)


def forward_pass(job: TrainingJob, rules: Rules, *, steady: bool) -> Pass:
    """Return what one micro-batch keeps, layer by layer.

    ``steady``: a backward pass has been, so that the last layer's checkpoint stays on the GPU.
    Source: unsloth-zoo@ce232d6c:gradient_checkpointing.py:UnslothCheckpointFunction.forward (LAST_GC_INDEX).
    """
    shape, lora = micro_batch(job), job.lora
    assert lora is not None
    stream = int(shape.num_tokens * job.model.hidden_size * dtype_bytes(job.precision.compute))
    memory = {layer: _layer(job, rules, layer, stream) for layer in dict.fromkeys(job.model.layers)}
    layers = [memory[layer] for layer in job.model.layers]
    if rules.checkpoints == "buffered" and steady:
        layers[-1] = replace(layers[-1], kept_bytes=stream)
    return Pass(
        layers=tuple(layers),
        grad_bytes=tuple(_grads(layer, job.model.hidden_size, lora) for layer in job.model.layers),
        stream_bytes=stream,
        head_input_bytes=stream,
        frame_bytes=sum(table_bytes(norm_table(norm, shape, _implementation(job))) for norm in job.model.final_norms),
    )


def _implementation(job: TrainingJob, *, mlp: bool = True, repeats: bool = False) -> Implementation:
    """Return the kernels: norm, rotation and gate are Triton's; the gate is transformers' where adapters are not fused.

    Source: unsloth@015bdef0:kernels/rms_layernorm.py:Fast_RMS_Layernorm (input and one fp32 value a row), kernels/
        rope_embedding.py:Fast_RoPE_Embedding_QK (nothing but the tables), kernels/fast_lora.py:LoRA_MLP (e and g).
    """
    return Implementation(
        attention="flash" if job.attention == "flash" else "sdpa",
        norm="fused",
        gated_ffn="fused" if mlp else "native",
        rotary="fused",
        compute_dtype=job.precision.compute,
        residual_dtype=job.precision.compute,
        autocast=True,
        trained=False,
        repeat_kv=repeats,
        pads_values=True,
    )


def _layer(job: TrainingJob, rules: Rules, layer: spec.Layer, stream: int) -> LayerMemory:
    shape, hidden, lora = micro_batch(job), job.model.hidden_size, job.lora
    assert lora is not None
    fused = fused_of(layer, hidden, lora)
    implementation = _implementation(job, mlp=fused.mlp, repeats=rules.repeats)
    table = layer_table(layer, hidden, shape, implementation) + _rows(job, rules, layer, fused, shape)
    recomputed = rules.checkpoints != "none"
    moments = [
        point
        for point in backward_points(layer, hidden, shape, implementation, table, recomputed=recomputed)
        if not (fused.mlp and point.name == "feed-forward")
    ]
    if fused.mlp:
        moments += [_fused_mlp(job, ffn, stream) for ffn in layer.ffns if isinstance(ffn, spec.DenseFFN)]
    points = [point.extra_bytes + (stream if recomputed else 0) for point in moments]
    if not fused.mlp and job.base_quantization is not None:  # these count the second output themselves
        written = written_out_points(layer, hidden, shape, implementation, table, recomputed=recomputed, reentrant=True)
        points += [point.extra_bytes for point in written]
    return _memory(rules, layer, table, points, stream)


def _memory(rules: Rules, layer: spec.Layer, table: Table, points: list[int], stream: int) -> LayerMemory:
    """Return a layer's memory by where its checkpoint is.

    Formula: recomputed, the whole table comes back, and the layer's second output stands beside it (in ``points``); the
        checkpoint lies there already, on the GPU or in the buffer, or is a new tensor that comes from the host.
    Source: unsloth-zoo@ce232d6c:gradient_checkpointing.py:UnslothCheckpointFunction.backward (outputs),
        Unsloth_Offloaded_Gradient_Checkpointer.backward (hidden_states.to); torch@2.13.0:torch/utils/checkpoint.py:
        CheckpointFunction.backward.
    """
    if rules.checkpoints == "none":
        return LayerMemory(kept_bytes=table_bytes(table), points=tuple((extra, 0) for extra in points))
    first = layer.norms[0].name
    lies = rules.checkpoints != "host"
    again = table_bytes(row for row in table if not (lies and row.module == first and row.name == "input"))
    return LayerMemory(
        kept_bytes=stream if rules.checkpoints == "gpu" else 0,
        points=tuple((again + extra, 0) for extra in points),
    )


def _rows(job: TrainingJob, rules: Rules, layer: spec.Layer, fused: Fused, shape: Shape) -> Table:
    """Return what the adapters keep: fused ones the input of a group once, the others as PEFT's.

    Source: unsloth@015bdef0:kernels/fast_lora.py:LoRA_MLP.forward, LoRA_QKV.forward, LoRA_W.forward
        (save_for_backward).
    """
    lora, hidden = job.lora, job.model.hidden_size
    assert lora is not None
    names = [one.name.removesuffix(".weight") for one in layer_targets(layer, hidden, lora.targets)]
    found: Table = ()
    for inside in (True, False):
        chosen = tuple(name for name in names if (name in fused.names) == inside)
        if chosen:
            found += adapter_table(
                layer,
                hidden,
                replace(lora, targets=chosen),
                precision_of(job, rules, fused=inside),
                num_tokens=shape.num_tokens,
                num_routed_tokens=shape.num_tokens,
            )
    return found


def _fused_mlp(job: TrainingJob, ffn: spec.DenseFFN, stream: int) -> Point:
    """The backward of the feed-forward block as one function.

    Formula: the gradient of its output nh + that of the product nI (the gradients of gate and up are written over gate
        and up, that of the input over the input) + where the base is packed one weight written out hI with its scales
        in fp32, 4hI/64. Forward, run again, needs the same: the product, the output, a weight.
    Source: unsloth@015bdef0:kernels/fast_lora.py:LoRA_MLP.backward; kernels/swiglu.py:swiglu_DWf_DW_dfg_kernel
        (returns its arguments), kernels/geglu.py likewise; kernels/utils.py:fast_dequantize.
    """
    width = int(dtype_bytes(job.precision.compute))
    product = micro_batch(job).num_tokens * ffn.intermediate_size * width
    weight = job.model.hidden_size * ffn.intermediate_size
    return Point(name="feed-forward, fused", extra_bytes=stream + product + written_out_bytes(job, weight))


def written_out_bytes(job: TrainingJob, num_weights: int) -> int:
    """Return what one packed weight takes while it is written out."""
    if job.base_quantization is None:
        return 0
    return int(num_weights * dtype_bytes(job.precision.compute)) + 4 * (num_weights // BLOCK)


def largest_fused(job: TrainingJob) -> int:
    """Return the elements of the largest weight that Unsloth's own functions write out, 0 where there is none."""
    lora, hidden, found = job.lora, job.model.hidden_size, 0
    assert lora is not None
    for layer in dict.fromkeys(job.model.layers):
        names = fused_of(layer, hidden, lora).names
        targets = layer_targets(layer, hidden, lora.targets)
        found = max([found, *(math.prod(one.shape) for one in targets if one.name.removesuffix(".weight") in names)])
    return found


def _grads(layer: spec.Layer, hidden_size: int, lora: Lora) -> int:
    """Return the fp32 gradients of a layer's adapters: r(in + out) each."""
    return sum(4 * lora.rank * sum(one.shape) for one in layer_targets(layer, hidden_size, lora.targets))
