"""What Megatron-LM's layers keep from forward to backward, tensor by tensor.

Legend: n tokens of the residual stream on the rank (b*s/c, over t under sequence parallelism), T = b*s/c tokens inside
tensor-parallel regions, h hidden size, a heads, g KV heads, d head size, t tensor-parallel size, f FFN size, 2 bytes
per element unless a dtype is named. ``module`` is what ``--recompute-modules`` goes by.
"""

from __future__ import annotations

from ullage.account.activations.saved import SavedTensor
from ullage.engines.megatron.defaults import Settings
from ullage.engines.megatron.mixture import mixture_saved
from ullage.engines.megatron.shape import Sizes
from ullage.engines.megatron.state_space import gated_delta_saved, mamba_saved
from ullage.errors import UnknownArchitectureError
from ullage.i18n import _
from ullage.numeric import larger, some, where
from ullage.spec.model import Attention, DenseFFN, GatedDeltaNet, LatentAttention, Layer, Mamba2, MoEFFN
from ullage.spec.training import TrainingJob

TE = "TransformerEngine@v2.8:transformer_engine/pytorch/"
MCORE = "Megatron-LM@adc69db:megatron/core/"

#: ``--recompute-modules`` word -> modules of the tables that are then not kept.
RECOMPUTED: dict[str, tuple[str, ...]] = {
    "core_attn": ("core_attn",),
    "moe_act": ("moe_act",),
    "layernorm": ("layernorm",),
    "mla_up_proj": ("mla_up_proj",),
    "mlp": ("mlp", "mlp_act"),
    "moe": ("moe", "moe_act"),
    "shared_experts": ("shared_experts",),
    "gdn_norm_out": ("gdn_norm_out",),
}


#: ``--offload-modules`` word -> tensors that go to the host.
#: Source: Megatron-LM@d98e8a6:docs/user-guide/features/fine_grained_activation_offloading.md.
OFFLOADED: dict[str, tuple[str, ...]] = {
    "attn_norm": ("input_layernorm.input",),
    "mlp_norm": ("pre_mlp_layernorm.input",),
    "qkv_linear": ("qkv.input", "layernorm.output", "down_proj.input"),
    "core_attn": (
        "query_key_value",
        "qkv.output",
        "softmax",
        "attention_dropout.output",
        "flash.output",
        "log_sum_exp",
    ),
    "attn_proj": ("core_attention.output",),
    "expert_fc1": ("experts.fc1.input",),
    "moe_act": ("experts.fc1.output", "experts.activated", "experts.fc2.input"),
}


def layer_saved(job: TrainingJob, settings: Settings, sizes: Sizes, layer: Layer) -> list[SavedTensor]:
    """Return everything one layer keeps for one micro-batch, recompute aside."""
    found: list[SavedTensor] = []
    if any(isinstance(mixer, Attention) and mixer.cross for mixer in layer.mixers):
        sizes = sizes.decoder()
    for mixer in layer.mixers:
        if isinstance(mixer, LatentAttention):
            found += _latent(job, settings, sizes, mixer)
        elif isinstance(mixer, Attention):
            found += _attention(job, settings, sizes, mixer)
        elif isinstance(mixer, Mamba2):
            found += mamba_saved(job, settings, sizes, mixer)
        elif isinstance(mixer, GatedDeltaNet):
            found += gated_delta_saved(job, settings, sizes, mixer)
        else:
            raise UnknownArchitectureError(
                _("Megatron-LM's activations of {kind} are not known").format(kind=type(mixer).__name__)
            )
        found += _dropout(job, settings, sizes, "self_attn")
    for block in layer.ffns:
        found += (
            mixture_saved(job, settings, sizes, block)
            if isinstance(block, MoEFFN)
            else _dense(job, settings, sizes, block)
        )
        found += _dropout(job, settings, sizes, "mlp")
    return found


def kept(job: TrainingJob, tensors: list[SavedTensor]) -> list[SavedTensor]:
    """Leave out what selective recompute builds again in backward, and what fine-grained offload moves to the host."""
    gone: set[str] = set()
    if job.recompute.kind in ("selective", "modules"):
        words = job.recompute.modules or ("core_attn",)
        gone = {module for word in words for module in RECOMPUTED.get(word, ())}
    away = offloaded_names(job)
    return [tensor for tensor in tensors if tensor.module not in gone and tensor.name not in away]


def offloaded_names(job: TrainingJob) -> set[str]:
    """Tensors that ``--fine-grained-activation-offloading`` copies to the host after forward."""
    flags = dict(job.flags)
    if flags.get("fine-grained-activation-offloading") != "true":
        return set()
    words = flags.get("offload-modules", "").strip("[]").replace(",", " ").split()
    return {name for word in words for name in OFFLOADED.get(word, ())}


def offloaded_bytes(job: TrainingJob, tensors: list[SavedTensor]) -> int:
    """Bytes of one layer and micro-batch that live on the host between forward and backward."""
    away = offloaded_names(job)
    return sum(tensor.bytes for tensor in tensors if tensor.name in away)


def saved(name: str, module: str, elements: int, dtype: str, formula: str, source: str) -> SavedTensor:
    """A saved tensor, arguments in table order."""
    return SavedTensor(name=name, module=module, num_elements=elements, dtype=dtype, formula=formula, source=source)


def linear_dtype(job: TrainingJob) -> str:
    """Format in which a Transformer Engine linear keeps its input: FP8 keeps the quantised copy only."""
    return "float8_e4m3" if job.precision.fp8_recipe else job.precision.compute


def _norm(job: TrainingJob, sizes: Sizes, name: str) -> list[SavedTensor]:
    """A norm's input (the residual stream, which nothing else keeps) and its statistics in fp32."""
    n, h = sizes.stream_tokens, job.model.hidden_size
    source = TE + "module/layernorm_linear.py:_LayerNormLinear.forward"
    stream = "float32" if dict(job.flags).get("fp32-residual-connection") == "true" else job.precision.compute
    return [
        saved(f"{name}.input", "stream", n * h, stream, "n*h", source),
        saved(f"{name}.statistics", "stream", 2 * n, "float32", "2*n", source),
    ]


def _attention(job: TrainingJob, settings: Settings, sizes: Sizes, part: Attention) -> list[SavedTensor]:
    """Norm, fused QKV projection, core attention, output projection.

    Formula: n*h input + n*h normalised + T*(a+2g)*d/t qkv + core. Rotary positions and grouped queries make copies that
        take the projection's place; norms of q and k keep it (as their input) beside the copies.
    """
    n, tokens, h, t = sizes.stream_tokens, sizes.tokens, job.model.hidden_size, sizes.tensor
    dtype = job.precision.compute
    heads, groups, dim = larger(1, part.num_heads // t), larger(1, part.num_kv_heads // t), part.head_dim
    found = _norm(job, sizes, "input_layernorm")
    found.append(saved("qkv.input", "qkv_linear", n * h, linear_dtype(job), "n*h", TE + "module/layernorm_linear.py"))
    projected = (tokens * heads + 2 * (sizes.encoder_tokens if part.cross else tokens) * groups) * dim
    source = MCORE + "transformer/attention.py:SelfAttention.get_query_key_value_tensors"
    found.append(saved("qkv.output", "self_attn", projected, dtype, "T*(a+2g)*d/t", source))
    if part.output_gate:
        gated = 2 * tokens * heads * dim
        found.append(saved("output_gate", "self_attn", gated, dtype, "2*T*a*d/t", source))
    if part.qk_norm or settings.on("qk-l2-norm"):
        found.append(saved("normed_query_key_value", "self_attn", projected, dtype, "T*(a+2g)*d/t", source))
        statistics = 2 * tokens * (heads + groups)
        found.append(saved("query_key_norm.statistics", "self_attn", statistics, "float32", "2*T*(a+g)/t", source))
    return found + _core(job, settings, sizes, heads=part.num_heads, value_dim=dim, cross=part.cross)


def _core(
    job: TrainingJob, settings: Settings, sizes: Sizes, *, heads: int, value_dim: int, cross: bool = False
) -> list[SavedTensor]:
    """Core attention and the input of the output projection.

    Formula: output T*a*d/t; fused kernels add the log-sum-exp a/t*T fp32; flash-attn, and any kernel under context
        parallelism, keep their own layout of the output beside the one that goes on; unfused attention keeps softmax,
        its dropout mask and result: b*a/t*s*s each.
    Source: TransformerEngine@v2.8:pytorch/attention/dot_product_attention/backends.py:FlashAttention.forward,
        UnfusedDotProductAttention.forward; arXiv:2205.05198 section 4.1.
    """
    tokens, t, dtype = sizes.tokens, sizes.tensor, job.precision.compute
    local = -(-heads // t)
    output = tokens * local * value_dim
    source = TE + "attention/dot_product_attention/backends.py"
    found = [saved("core_attention.output", "attn_proj", output, dtype, "T*a*d/t", source)]
    if settings.attention in ("flash", "fused"):
        found.append(saved("log_sum_exp", "core_attn", tokens * local, "float32", "T*a/t", source))
        copied = output if settings.attention == "flash" else where(sizes.context > 1, output, 0)
        if some(copied):
            found.append(saved("flash.output", "core_attn", copied, dtype, "T*a*d/t", source))
        return found
    scores = sizes.scores(heads, cross=cross)
    plain = settings.attention == "local" and settings.on("no-masked-softmax-fusion")
    found.append(saved("softmax", "core_attn", scores, "float32" if plain else dtype, "b*a/t*s^2", source))
    if settings.attention_dropout:
        found.append(saved("attention_dropout.mask", "core_attn", scores, "bool", "b*a/t*s^2", source))
        found.append(saved("attention_dropout.output", "core_attn", scores, dtype, "b*a/t*s^2", source))
    return found


def _latent(job: TrainingJob, settings: Settings, sizes: Sizes, part: LatentAttention) -> list[SavedTensor]:
    """Multi-head latent attention: norm, down-projections, norms of the latents, up-projections, core, output.

    Formula: 2*n*h + n*(2*rq + 2*rkv + dr + rkv) + T*a/t*(2*(dn+dr) + dv) + core.
    Symbols: rq, rkv ranks of the latents; dn, dr head sizes without and with rotary; dv of values.
    Source: Megatron-LM@adc69db:megatron/core/transformer/multi_latent_attention.py:MLASelfAttention.
    """
    n, tokens, h = sizes.stream_tokens, sizes.tokens, job.model.hidden_size
    dtype, source = job.precision.compute, MCORE + "transformer/multi_latent_attention.py:MLASelfAttention"
    heads = -(-part.num_heads // sizes.tensor)
    rank, wide = part.q_lora_rank or 0, part.qk_nope_head_dim + part.qk_rope_head_dim
    found = _norm(job, sizes, "input_layernorm")
    quantised = linear_dtype(job)
    found.append(saved("layernorm.output", "layernorm", n * h, dtype, "n*h", source))
    if quantised != dtype:
        found.append(saved("down_proj.input", "qkv_linear", n * h, quantised, "n*h", source))
    latents = n * (rank + part.kv_lora_rank + part.qk_rope_head_dim)
    found.append(saved("latents", "self_attn", latents, dtype, "n*(rq+rkv+dr)", source))
    normed = n * (rank + part.kv_lora_rank)
    found.append(saved("up_proj.input", "mla_up_proj", normed, quantised, "n*(rq+rkv)", source))
    found.append(
        saved(
            "query_key_value",
            "mla_up_proj",
            tokens * heads * (2 * wide + part.v_head_dim),
            dtype,
            "T*a/t*(2*(dn+dr)+dv)",
            source,
        )
    )
    return found + _core(job, settings, sizes, heads=part.num_heads, value_dim=part.v_head_dim)


def _dense(job: TrainingJob, settings: Settings, sizes: Sizes, part: DenseFFN) -> list[SavedTensor]:
    """A dense block: norm, up (and gate), activation, down.

    Formula: n*h input + n*h normalised + T*u*f/t before and T*f/t after the activation; u = 2 for a gated block.
        Unfused SwiGLU keeps the activated gate too.
    Source: Megatron-LM@adc69db:megatron/core/transformer/mlp.py:MLP.forward, fusions/fused_bias_swiglu.py.
    """
    n, tokens, h, t = sizes.stream_tokens, sizes.tokens, job.model.hidden_size, sizes.tensor
    dtype, inner = job.precision.compute, tokens * part.intermediate_size // t
    source = MCORE + "transformer/mlp.py:MLP.forward"
    wide = inner * (2 if part.gated else 1)
    found = _norm(job, sizes, "pre_mlp_layernorm")
    found.append(saved("fc1.input", "mlp", n * h, linear_dtype(job), "n*h", TE + "module/layernorm_linear.py"))
    found.append(saved("fc1.output", "mlp", wide, dtype, "T*u*f/t", source))
    if part.gated and not settings.fused_activation:
        found.append(saved("activated_gate", "mlp", inner, dtype, "T*f/t", source))
    if part.activation == "relu2":
        found.append(saved("relu", "mlp", inner, dtype, "T*f/t", source))
    found.append(saved("fc2.input", "mlp_act", inner, linear_dtype(job), "T*f/t", source))
    return found


def _dropout(job: TrainingJob, settings: Settings, sizes: Sizes, module: str) -> list[SavedTensor]:
    """The mask of the residual dropout: one byte per element; none without dropout."""
    if not settings.hidden_dropout:
        return []
    elements = sizes.stream_tokens * job.model.hidden_size
    source = MCORE + "fusions/fused_bias_dropout.py:bias_dropout_add_fused_train"
    return [saved("dropout.mask", "stream", elements, "bool", "n*h", source)]
