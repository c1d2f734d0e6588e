"""The other models on the card: frozen copies of the policy's size, and the value model of PPO."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ullage.account.parameters import count
from ullage.engines import training
from ullage.engines.rlhf.resolve import scalar_head
from ullage.engines.training import TrainingRank, TrainingStep
from ullage.ledger import Ledger, Term, merged, total
from ullage.spec.rlhf import Rlhf
from ullage.spec.training import TrainingJob
from ullage.units import cdiv, dtype_bytes

#: Of a value model, what stands through the whole step; what it keeps of its forward pass.
_STANDING = ("weights", "adapters", "optimizer", "ddp_buckets", "gradients")
_KEPT = ("kept_activations", "final_norm_and_head_input")


def frozen_models(asked: Rlhf) -> tuple[str, ...]:
    """Return the names of the frozen models that stand beside the policy.

    Source: trl@1.16.0:trainer/dpo_trainer.py:DPOTrainer.__init__ (ref_model); trl@0.19.1:trainer/ppo_trainer.py:
        PPOTrainer.__init__ (ref_model, reward_model).
    """
    found = ("reference",) if asked.reference == "copy" else ()
    return (*found, "reward_model") if asked.kind == "ppo" or asked.reward_model else found


def value_step(policy: TrainingJob) -> TrainingStep:
    """Return the step of PPO's value model: as large as the policy, a scalar head, trained with it.

    Source: trl@0.19.1:trainer/ppo_trainer.py:PolicyAndValueWrapper (one optimizer over both).
    """
    asked = Rlhf(kind="rm", reference="none", log_probs="none", alone=True)
    flags = policy.flags if "fused_kernels" in dict(policy.flags) else (*policy.flags, ("fused_kernels", ""))
    return training.step(replace(policy, model=scalar_head(policy.model), rlhf=asked, loss="liger", flags=flags))


def beside(rank: TrainingRank, policy: TrainingJob, value: TrainingStep | None) -> TrainingRank:
    """Return the rank with the other models laid beside every moment.

    Formula: a copy takes what the policy's weights take on the rank: the same dtype, the same shards; where those are
        on the host, its shard is there, too.
    Source: trl@1.16.0:trainer/dpo_trainer.py:DPOTrainer.__init__ (the policy's dtype, prepare_deepspeed,
        prepare_fsdp); ms-swift@3602360a:swift/megatron/trainers/rlhf_mixin.py:MegatronRLHFTrainer.prepare_model.
    """
    asked = policy.rlhf
    assert asked is not None
    weights = next((term for term in merged(rank.after_step.allocated.children) if term.name == "weights"), None)
    names = frozen_models(asked)
    if weights is None:
        rank = replace(rank, host_bytes=rank.host_bytes + len(names) * _shard_bytes(policy))
    copies = () if weights is None else tuple(_copy(weights, f"{name}_weights") for name in names)
    if value is None:
        return _added(rank, lambda ledger: copies)
    other = value.ranks[0]
    by_name = {ledger.moment: ledger for ledger in other.moments}
    return _added(rank, lambda ledger: (*copies, *_of_value(by_name.get(ledger.moment, other.after_step))))


def _shard_bytes(policy: TrainingJob) -> int:
    ranks = policy.parallel.data_parallel_size * policy.parallel.context_parallel_size
    return int(cdiv(count(policy.model).total, ranks) * dtype_bytes(policy.precision.params))


def _copy(weights: Term, name: str) -> Term:
    return replace(weights, name=name, children=(), formula="frozen, as the policy's weights")


def _of_value(ledger: Ledger) -> tuple[Term, ...]:
    parts = [term for term in ledger.allocated.children if term.name in (*_STANDING, *_KEPT)]
    return (total("value_model", parts),) if parts else ()


def _added(rank: TrainingRank, terms: Callable[[Ledger], tuple[Term, ...]]) -> TrainingRank:
    return replace(
        rank,
        moments=tuple(with_terms(ledger, terms(ledger)) for ledger in rank.moments),
        after_step=with_terms(rank.after_step, terms(rank.after_step)),
    )


def with_terms(ledger: Ledger, terms: tuple[Term, ...]) -> Ledger:
    """Return the ledger with more allocated terms; rounding stays that of the policy's step."""
    found = tuple(term for term in terms if term.high_bytes)
    if not found:
        return ledger
    return replace(ledger, allocated=total("allocated", (*ledger.allocated.children, *found)))
