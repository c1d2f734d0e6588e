"""``--mem-fraction-static`` where the user left it open: one rule per era.

The fraction is of the memory that is free after ``torch.distributed`` has started and before weights are loaded; what
it leaves, (1 - f) of that, must hold activations and CUDA graphs.
"""

from __future__ import annotations

from typing import Any

from ullage.engines.sglang import graphs
from ullage.engines.sglang.flags import Flags
from ullage.engines.sglang.traits import Traits
from ullage.engines.sglang.versions import Release
from ullage.errors import InputError
from ullage.frozen import Frozen
from ullage.i18n import _
from ullage.spec.serving import ServingJob

#: Parameters of the ViT-L/14 that the multimodal correction compares with: 24 layers x 12 x 1024 x 1024.
#: Source: sglang@0.5.23:srt/arg_groups/memory_hook.py:adjust_mem_fraction_for_vlm.
_BASELINE_VISION_PARAMETERS = 24 * 12 * 1024**2


class Demand(Frozen):
    """What the rules look at. ``graph_max`` is 0 without decode graphs, ``ranks`` is tp x pp."""

    job: ServingJob
    flags: Flags
    traits: Traits
    capacity_mib: float
    ranks: int
    attention_dp: int
    pp: int
    chunk: int
    graph_max: int
    speculative: str


def mem_fraction(demand: Demand, release: Release, assumed: list[str]) -> float:
    """Return the fraction; adds a sentence on how it came about to ``assumed`` where a default was taken.

    Raises:
        InputError: a given fraction that is not between 0 and 1.
    """
    given = demand.job.memory_fraction
    if given is not None:
        if not 0 < given < 1:
            raise InputError(
                _("a mem-fraction-static of {value} cannot be used").format(value=given),
                remedy=_("give a number between 0 and 1, such as 0.88"),
            )
        return given
    fixed = release.rule("dsa")["mem_fraction_static"] if demand.traits.dsa else None
    if fixed is not None:
        value, formula = float(fixed), f"fixed to {fixed} for sparse attention"
    else:
        value, formula = _by_rule(demand, release.rule("mem_fraction_static"))
        value, formula = _for_vision(demand, release, value, formula, assumed)
    if value <= 0:
        raise InputError(
            _("by SGLang's own rule nothing is left for weights and cache on this card"),
            remedy=_("give --mem-fraction-static"),
        )
    sentence = _("mem_fraction_static: {value:.3f} taken, the default of SGLang {version}: {formula}")
    assumed.append(sentence.format(value=value, version=release.version, formula=formula))
    return value


def _by_rule(demand: Demand, rule: dict[str, Any]) -> tuple[float, str]:
    kind = rule["rule"]
    if kind == "by_tensor_parallel_size":
        ranks = demand.ranks // demand.pp
        return _step(rule["steps"], ranks), f"by tensor-parallel size {ranks}"
    if kind == "by_parallel_size_and_card":
        return _by_card(demand, rule)
    kept, formula = _table(demand, rule) if kind == "reserve_table" else _reserve(demand, rule)
    value = round((demand.capacity_mib - kept) / demand.capacity_mib, 3)
    return value, f"({demand.capacity_mib:,.0f} - ({formula})) / {demand.capacity_mib:,.0f} MiB"


def _step(steps: list[list[float]], ranks: int) -> float:
    return next(value for at_least, value in steps if ranks >= at_least)


def _by_card(demand: Demand, rule: dict[str, Any]) -> tuple[float, str]:
    """Mirror of sglang@0.4.6.post4:srt/server_args.py:ServerArgs.__post_init__."""
    card = demand.capacity_mib
    value = _step(rule["steps"], demand.ranks) if card <= rule["small_card_mib"] else rule["large_card"]
    if card <= rule["huge_card_mib"]:
        return value, f"by {demand.ranks} ranks and {card:,.0f} MiB"
    raised = value + rule["huge_card_slack_mib"] * (1 - value) / card
    capped = (card - rule["huge_card_reserve_mib"]) / card
    return min(raised, capped), f"min({raised:.4f}, 1 - {rule['huge_card_reserve_mib']:,} / {card:,.0f} MiB)"


def _table(demand: Demand, rule: dict[str, Any]) -> tuple[float, str]:
    """Mirror of sglang@0.4.10:srt/server_args.py:ServerArgs.__post_init__. Returns (MiB kept free, formula)."""
    row = next(row for row in rule["table"] if row[0] is None or demand.capacity_mib < row[0])
    kept = (row[1] + row[2] * demand.ranks) * 1024
    parts = [f"1024 x ({row[1]} + {row[2]} x {demand.ranks} ranks)"]
    if demand.speculative:
        kept += rule["speculative_mib"]
        parts.append(f"{rule['speculative_mib']} speculation")
    if demand.attention_dp > 1:
        kept += rule["dp_attention_mib"]
        parts.append(f"{rule['dp_attention_mib']} DP attention")
    return kept, " + ".join(parts)


def _reserve(demand: Demand, rule: dict[str, Any]) -> tuple[float, str]:
    """Return (MiB kept free, formula).

    Formula: 512 + 1.5 c + 2 b + tp*pp/8*1024 + 3 b d (+ 1.5 b d if b > 300) + prefill graphs, at least 10 GiB on cards
        above 60 GB; then 2 GiB for DeepEP.
    Symbols: c chunked_prefill_size (at least 2048), b largest decode graph, d attention data-parallel size.
    Source: sglang@0.5.23:srt/arg_groups/memory_hook.py:handle_gpu_memory_settings, reserve_for_graph_mb.
    """
    mode = demand.flags.text("disaggregation_mode", "null")
    batch = 0 if mode == "prefill" else demand.graph_max
    tokens = max(demand.chunk, rule["min_chunk_tokens"])
    kept = rule["constant_mib"] + tokens * rule["mib_per_chunk_token"] + demand.ranks / 8 * rule["mib_per_8_ranks"]
    parts = [f"{rule['constant_mib']} + {rule['mib_per_chunk_token']} x {tokens} tokens", f"{demand.ranks} ranks x 128"]
    graph = batch * rule["mib_per_graph_batch"]
    if demand.attention_dp > 1:
        large = batch > rule["dp_attention_large_batch"]
        per = rule["dp_attention_mib_per_graph_batch_and_rank"]
        graph += batch * demand.attention_dp * (per + (rule["dp_attention_large_batch_mib"] if large else 0))
    if mode != "decode":
        graph += _prefill_graphs(demand, rule)
    kept += graph
    parts.append(f"{graph:,.0f} graphs")
    if demand.capacity_mib > rule["floor_above_mib"] and kept < rule["floor_mib"]:
        kept = rule["floor_mib"]
        parts = [f"at least {rule['floor_mib']}"]
    later = _after_the_floor(demand, rule, batch)
    if later:
        parts.append(f"{later:,.0f} drafts and all-to-all")
    return kept + later, " + ".join(parts)


def _prefill_graphs(demand: Demand, rule: dict[str, Any]) -> float:
    """MiB for captured prefill: a fixed amount for MLA, else per captured size."""
    sizes = graphs.prefill_sizes(demand)
    if not sizes:
        return 0.0
    kept = rule["prefill_graph_mla_mib"] if demand.traits.mla else len(sizes) * rule["prefill_graph_mib_per_size"]
    return float(kept + (rule["deepep_prefill_graph_mib"] if demand.flags.all_to_all == "deepep" else 0))


def _after_the_floor(demand: Demand, rule: dict[str, Any], batch: int) -> float:
    kept = 0.0
    if demand.speculative == "STANDALONE":
        kept += rule["standalone_mib"]
    elif demand.speculative not in ("", "NGRAM"):
        kept += rule["speculative_mib"]
    if demand.flags.all_to_all == "deepep" and batch:
        kept += rule["deepep_mib"]
    return kept


def _for_vision(demand: Demand, release: Release, value: float, formula: str, assumed: list[str]) -> tuple[float, str]:
    """Lower the fraction for a model with a vision tower, by the tower's size against ViT-L/14.

    Formula: f x 0.95 x clamp(1 - 0.1 (r - 1), 0.8, 1.05).
    Symbols: r = layers x hidden^2 of the tower / (24 x 1024^2); here the ratio of parameters, which is the same for
        towers of the same shape.
    Source: sglang@0.5.23:srt/arg_groups/memory_hook.py:adjust_mem_fraction_for_vlm.
    """
    factor = release.rule("multimodal")["fraction_factor"]
    if factor is None or not demand.traits.multimodal or demand.flags.on("language_only"):
        return value, formula
    ratio = demand.traits.vision_parameters / _BASELINE_VISION_PARAMETERS
    factor *= max(0.8, min(1.05, 1.0 - 0.1 * (ratio - 1.0)))
    assumed.append(_("size of the vision tower judged by its parameters: factor {factor:.3f}").format(factor=factor))
    return value * factor, f"{formula}, x {factor:.3f} for the vision tower"
