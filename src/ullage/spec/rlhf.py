"""Preference and reinforcement training: which models share the card, and how completions come about.

The field's names: TRL's trainers, ``stage`` of LLaMA-Factory, ``rl`` of axolotl, ``rlhf_type`` of ms-swift.
"""

from __future__ import annotations

from typing import Literal, get_args

from ullage.frozen import Frozen

RlhfKind = Literal["dpo", "orpo", "simpo", "cpo", "kto", "rm", "grpo", "rloo", "ppo"]
Reference = Literal["copy", "adapter", "precomputed", "none"]
LogProbStyle = Literal["", "rows", "full", "tiled", "inplace", "none", "unused"]
KINDS: tuple[str, ...] = get_args(RlhfKind)
#: A row of the batch is a pair: the chosen and the rejected answer run as two rows of one forward pass.
PAIRED = ("dpo", "orpo", "simpo", "cpo", "rm")
#: Compared with a frozen reference model unless something else is said.
REFERRED = ("dpo", "kto", "rloo", "ppo")
#: Completions are generated while the job runs.
ON_POLICY = ("grpo", "rloo", "ppo")


class Rollout(Frozen):
    """Where completions are generated.

    Attributes:
        engine: ``vllm`` on the same card, ``transformers`` with the policy itself, or ``server`` on other cards.
        memory_fraction: of the card, vLLM's pool (``gpu_memory_utilization``).
        sleeps: the pool is given back while the policy is trained (``vllm_enable_sleep_mode``, verl's
            ``free_cache_engine``).
        alone: the policy, its gradients and states are on the host meanwhile (verl's ``param_offload`` and
            ``optimizer_offload``).
    """

    engine: Literal["vllm", "transformers", "server"] = "transformers"
    memory_fraction: float = 0.0
    sleeps: bool = False
    alone: bool = False


class Rlhf(Frozen):
    """What is trained against what. ``None`` means *not given*.

    Attributes:
        kind: dpo, orpo, simpo, cpo, kto, rm (reward model), grpo, rloo or ppo.
        reference: a frozen ``copy`` of the model, the policy with its ``adapter`` switched off, log-probabilities
            ``precomputed`` before training, or ``none``.
        completion_len: generated tokens of a row; ``seq_len`` of the job holds the prompt too.
        steps_per_generation: micro-batches whose completions are generated at once.
        rollout: where completions are generated, for the kinds that need it.
        reward_model: a frozen reward model of the policy's size stands on the card too (ppo always has one).
        log_probs: how log-probabilities of the labels are made: ``rows`` (all logits, log-softmax row by row), ``full``
            (all at once), ``tiled`` (no logits: tiles of head and log-softmax), ``inplace`` (a kernel that writes the
            gradient over the logits), ``none`` (a scalar head in the place of the vocabulary's), ``unused`` (a scalar
            head beside it: logits are made and dropped). Empty: by the framework's version.
        alone: the policy is walked by itself: frozen models, scoring and generation are laid beside it afterwards.
    """

    kind: RlhfKind
    reference: Reference | None = None
    completion_len: int | None = None
    steps_per_generation: int | None = None
    rollout: Rollout | None = None
    reward_model: bool = False
    log_probs: LogProbStyle = ""
    alone: bool = False

    @property
    def headless(self) -> bool:
        """A scalar head stands in the place of the vocabulary's."""
        return self.kind == "rm" and self.log_probs != "unused"
