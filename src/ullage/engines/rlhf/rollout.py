"""Generation on the training card: transformers with its cache, or vLLM's pool beside the policy."""

from __future__ import annotations

from dataclasses import replace

from ullage.account.activations.log_probs import TILE_TOKENS
from ullage.account.kv_cache import bytes_per_token
from ullage.account.sharding import whole
from ullage.account.weights import weights_term
from ullage.engines.rlhf.models import with_terms
from ullage.engines.training import TrainingRank
from ullage.ledger import Ledger, Term, exact, ranged, total
from ullage.spec.rlhf import Rlhf
from ullage.spec.training import TrainingJob
from ullage.units import GiB, dtype_bytes

_VLLM = "trl@1.16.0:generation/vllm_generation.py:VLLMGeneration"
#: What vLLM keeps of a card besides its fraction: CUDA graphs, made after the pool; and what stays of it asleep.
#: Source: vllm@0.33.0:vllm/v1/worker/gpu_worker.py:Worker.compile_or_warm_up_model, Worker.sleep.
GRAPHS_BYTES = GiB
ASLEEP_BYTES = (0, GiB, 3 * GiB)


def with_generation(rank: TrainingRank, policy: TrainingJob) -> TrainingRank:
    """Return the rank with the moment of generation, and vLLM's pool beside every other moment.

    Source: trl@1.16.0:trainer/grpo_trainer.py:GRPOTrainer._generate_single_turn.
    """
    asked = policy.rlhf
    assert asked is not None and asked.rollout is not None
    rollout = asked.rollout
    start = replace(rank.after_step, moment="generation")
    if rollout.engine == "server":
        return rank
    if rollout.engine == "transformers":
        found = with_terms(start, (_cache(policy, asked), _gathered(policy, rank), _logits(policy, asked)))
        return replace(rank, moments=(found, *rank.moments))
    pool, sleeping = _pool(policy), rollout.sleeps
    beside = _asleep() if sleeping else pool
    generation = _alone(start, pool) if rollout.alone else with_terms(start, (pool,))
    return replace(
        rank,
        moments=(generation, *(with_terms(one, (beside,)) for one in rank.moments)),
        after_step=with_terms(rank.after_step, (beside,)),
    )


def _alone(ledger: Ledger, pool: Term) -> Ledger:
    """Return the moment of generation with the policy on the host and the cache of its allocator emptied.

    Source: verl@1dda039:verl/workers/engine/fsdp/transformer_impl.py (offload_fsdp_model_to_cpu), verl/workers/
        engine_workers.py (aggressive_empty_cache).
    """
    return replace(ledger, allocated=total("allocated", (pool,)), reserved_overhead=exact("reserved_overhead", 0))


def _pool(policy: TrainingJob) -> Term:
    """Return what vLLM takes of the card: its fraction, weights and cache and all, and CUDA graphs beyond it.

    Formula: gpu_memory_utilization x the card's memory.
    Known error: graphs are taken as nothing to 1 GiB; the fraction counts what stood on the card before, in versions
        before 0.8, so that the pool was smaller.
    """
    rollout = policy.rlhf.rollout if policy.rlhf else None
    fraction = rollout.memory_fraction if rollout else 0.0
    size = round(fraction * policy.machine.gpu.total_bytes)
    return ranged(
        "rollout_pool",
        size,
        low=size,
        high=size + GRAPHS_BYTES,
        formula=f"{fraction:g} x the card's memory",
        source=_VLLM,
    )


def _asleep() -> Term:
    low, size, high = ASLEEP_BYTES
    return ranged("rollout_asleep", size, low=low, high=high, formula="graphs and workspaces", source=_VLLM)


def _cache(policy: TrainingJob, asked: Rlhf) -> Term:
    """Return the key-value cache of a generation by transformers, at its end.

    Formula: rows x length x bytes a token, and one layer's keys and values once more: each step concatenates them.
    Source: transformers@5.23.0:cache_utils.py:DynamicLayer.update (torch.cat).
    """
    rows = policy.micro_batch_size * (asked.steps_per_generation or 1)
    each = bytes_per_token(policy.model, policy.precision.compute)
    size = int(rows * policy.seq_len * each)
    copy = size // max(1, len(policy.model.layers))
    return ranged(
        "generation_kv_cache",
        size + copy,
        low=size,
        high=size + 2 * copy,
        formula=f"{rows} x {policy.seq_len:,} tokens x {int(each):,} bytes",
        source="transformers@5.23.0:cache_utils.py:DynamicLayer.update",
    )


def _gathered(policy: TrainingJob, rank: TrainingRank) -> Term:
    """Return the whole weights where shards are gathered to generate.

    Source: trl@1.16.0:trainer/grpo_config.py:GRPOConfig (ds3_gather_for_generation, on by default).
    """
    parallel = policy.parallel
    if (parallel.zero_stage != 3 and parallel.fsdp is None) or parallel.data_parallel_size == 1:
        return exact("gathered_weights", 0)
    share = replace(whole(policy.model), mtp=False, towers=False)
    size = weights_term(policy.model, share, quantization=None, dtype=policy.precision.params).bytes
    source = "trl@1.16.0:trainer/grpo_config.py:GRPOConfig.ds3_gather_for_generation"
    return ranged("gathered_weights", size, low=size // 2, high=size, formula="all shards", source=source)


def _logits(policy: TrainingJob, asked: Rlhf) -> Term:
    """Return the logits of one step of generation and their copies in fp32: the last token of every row."""
    rows = policy.micro_batch_size * (asked.steps_per_generation or 1)
    size = rows * policy.model.vocab_size * (int(dtype_bytes(policy.precision.compute)) + 2 * 4)
    layer = min(policy.seq_len, TILE_TOKENS) * policy.model.hidden_size * 8
    return ranged(
        "generation_work",
        size + layer,
        low=size // 2,
        high=3 * (size + layer),
        formula="last logits, layer",
        source="transformers@5.23.0:generation/utils.py:GenerationMixin._sample",
    )
