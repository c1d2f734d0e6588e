"""Which part of the model each class of ranks holds."""

from __future__ import annotations

from ullage.account.sharding import RankShare
from ullage.engines.sglang.defaults import Settings
from ullage.errors import LayoutError
from ullage.frozen import Frozen
from ullage.i18n import _
from ullage.spec import model as spec


class Stage(Frozen):
    """One pipeline stage: its ranks are equal."""

    pp_rank: int
    num_ranks: int
    share: RankShare


def stages(settings: Settings) -> tuple[Stage, ...]:
    """Return the stages of one replica.

    Source: sglang@0.5.23:srt/distributed/utils.py:get_pp_indices (the last stages take the rest).

    Raises:
        LayoutError: a written-out split that does not add up, or an impossible expert split.
    """
    num_layers, pp = len(settings.job.model.layers), settings.pp
    counts = settings.job.parallel.pipeline_layers
    if counts is None:
        base, rest = divmod(num_layers, pp)
        counts = tuple(base + (1 if rank >= pp - rest else 0) for rank in range(pp))
    if len(counts) != pp or sum(counts) != num_layers or min(counts) < 1:
        raise LayoutError(
            _("{counts} does not split {layers} layers over {pp} stages").format(
                counts=counts, layers=num_layers, pp=pp
            )
        )
    found, first = [], 0
    for rank, count in enumerate(counts):
        share = _share(settings, (first, first + count), first_stage=rank == 0, last_stage=rank == pp - 1)
        found.append(Stage(pp_rank=rank, num_ranks=settings.tp * settings.copies, share=share))
        first += count
    return tuple(found)


def _share(settings: Settings, layers: tuple[int, int], *, first_stage: bool, last_stage: bool) -> RankShare:
    """Return a rank's share.

    Source: sglang@0.5.23:srt/models/deepseek_v2.py:DeepseekV2MoE, DeepseekV2MLP, DeepseekV2ForCausalLM;
        sglang@0.4.6.post4:srt/models/deepseek_v2.py for the older embedding and cloned shared experts.
    """
    flags, tp = settings.flags, settings.tp
    under_dp = settings.attention_dp > 1
    whole_embedding = under_dp and settings.release.rule("embedding_under_dp_attention") == "whole"
    return RankShare(
        layers=layers,
        embedding=first_stage,
        head=last_stage,
        final=last_stage,
        mtp=last_stage and settings.draft_tokens > 0 and settings.job.draft_model is None,
        towers=first_stage and not flags.on("language_only"),
        attention_tp=settings.attention_tp,
        dense_tp=1 if flags.integer("moe_dense_tp_size") == 1 else tp,
        shared_expert_tp=_shared_expert_ranks(settings),
        expert_tp=tp // settings.expert_ranks,
        num_local_experts=_local_experts(settings),
        vocab_tp=1 if whole_embedding else settings.attention_tp,
        head_tp=settings.attention_tp if flags.on("enable_dp_lm_head") else tp,
    )


def _shared_expert_ranks(settings: Settings) -> int:
    """Return over how many ranks a shared expert is sliced: whole with an all-to-all backend, or where it is cloned."""
    if settings.flags.all_to_all:
        return 1
    capability = settings.job.machine.gpu.compute_capability or (9, 0)
    cloned = (
        settings.release.rule("shared_experts") == "cloned"
        and settings.job.model.architecture == "DeepseekV3ForCausalLM"
        and settings.traits.num_experts == 256
        and capability >= (9, 0)
        and not settings.flags.on("disable_shared_experts_fusion")
    )
    return 1 if cloned else settings.tp


def _local_experts(settings: Settings) -> int | None:
    """Return the routed experts per layer that a rank holds (slices count as whole); None: all of them."""
    on_gpu = settings.flags.integer("kt_num_gpu_experts")
    if on_gpu is not None and settings.traits.num_experts:
        return min(on_gpu, settings.traits.num_experts)
    if settings.expert_ranks == 1 or not settings.traits.num_experts:
        return None
    redundant = settings.job.redundant_experts or settings.flags.integer("ep_num_redundant_experts") or 0
    experts = settings.traits.num_experts + redundant
    if experts % settings.expert_ranks:
        raise LayoutError(
            _("{experts} experts cannot be spread over {ranks} ranks").format(
                experts=experts, ranks=settings.expert_ranks
            ),
            remedy=_("choose --ep-num-redundant-experts so that the sum divides"),
        )
    return experts // settings.expert_ranks


def absorbed_bytes(model: spec.Model, share: RankShare) -> int:
    """Return the bf16 copies of ``kv_b_proj`` that absorbed latent attention multiplies with (w_kc, w_vc).

    Formula: L x N/t x (Dn + Dv) x r x 2; ``kv_b_proj`` itself stays.
    Symbols: N heads, t attention ranks, Dn qk_nope_head_dim, Dv v_head_dim, r kv_lora_rank.
    Source: sglang@0.5.23:srt/models/deepseek_common/deepseek_weight_loader.py:post_load_weights;
        sglang@0.4.6.post4:srt/models/deepseek_v2.py:post_load_weights.
    Known error: checkpoints with fp8 per channel or int8 keep one byte per element where this counts two.
    """
    parts = [mixer for layer in model.layers[slice(*share.layers)] for mixer in layer.mixers]
    if share.mtp:
        parts += [mixer for module in model.mtp for mixer in module.layer.mixers]
    found = 0
    for part in parts:
        if isinstance(part, spec.LatentAttention):
            heads = part.num_heads // share.attention_tp
            found += heads * (part.qk_nope_head_dim + part.v_head_dim) * part.kv_lora_rank * 2
    return found
