"""Mixture of experts: ask for a smaller micro-batch, or less capacity, before the fullest rank runs out of memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ullage.errors import InputError
from ullage.guard.loop import Guard
from ullage.i18n import _

#: Weight of the newest window in the running mean of the skew, and standard deviations allowed for above it.
NEWEST = 0.2
DEVIATIONS = 3.0


class Skew:
    """The load of the fullest group of experts over the mean: a running mean and variance, and what to expect."""

    def __init__(self) -> None:
        self.mean, self.variance, self.seen = 1.0, 0.0, 0

    def feed(self, counts: Sequence[int], num_ranks: int) -> float:
        """Take the tokens of each expert; return the skew of this window: fullest rank over mean."""
        per_rank = len(counts) // num_ranks
        loads = [sum(counts[at : at + per_rank]) for at in range(0, len(counts), per_rank)]
        total = sum(loads)
        skew = max(loads) * num_ranks / total if total else 1.0
        weight = NEWEST if self.seen else 1.0
        delta = skew - self.mean
        self.mean += weight * delta
        self.variance = (1 - weight) * (self.variance + weight * delta * delta)
        self.seen += 1
        return skew

    def expected(self) -> float:
        """Return the skew to be ready for: mean + 3 standard deviations."""
        return self.mean + DEVIATIONS * float(self.variance**0.5)


class ExpertWatch:
    """Watch the routers of a model, and act when the expected skew does not fit.

    Formula: need = tokens × top_k / ranks × skew × bytes_per_token, against ``limit_bytes``; tokens of a micro-batch on
    all expert-parallel ranks. ``bytes_per_token``: what the experts' activations take per routed token
    (``ullage fit train`` prints the term). ``capacity``, if given, is called with the skew that still fits, in place of
    a smaller micro-batch.
    """

    def __init__(
        self,
        guard: Guard,
        *,
        num_experts: int,
        num_ranks: int,
        bytes_per_token: float,
        limit_bytes: int,
        capacity: Callable[[float], None] | None = None,
    ) -> None:
        if num_ranks < 1 or num_experts % num_ranks:
            raise InputError(
                _("{experts} experts cannot be shared by {ranks} ranks").format(experts=num_experts, ranks=num_ranks)
            )
        self.guard, self.num_experts, self.num_ranks = guard, num_experts, num_ranks
        self.bytes_per_token, self.limit_bytes, self.capacity = bytes_per_token, limit_bytes, capacity
        self.skew: dict[str, Skew] = {}
        self._acted_at = -1

    def attach(self, router: Any, name: str = "router", pick: Callable[[Any], Any] | None = None) -> Any:
        """Hook a router whose output ``pick`` turns into the chosen experts (int tensor); return the hook's handle."""

        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            import torch

            chosen = (pick or (lambda value: value))(output).detach().reshape(-1)
            counts = torch.bincount(chosen, minlength=self.num_experts)
            if counts.numel() != self.num_experts:
                raise InputError(_("the router chose experts beyond {num}").format(num=self.num_experts))
            self.observe(counts.tolist(), name)

        return router.register_forward_hook(hook)

    def observe(self, counts: Sequence[int], name: str = "router") -> bool:
        """Take the tokens that each expert got in a micro-batch; True where something was asked for."""
        if len(counts) != self.num_experts:
            raise InputError(
                _("{given} counts for {num} experts").format(given=len(counts), num=self.num_experts), where=name
            )
        skew = self.skew.setdefault(name, Skew())
        now = skew.feed(counts, self.num_ranks)
        expected = max(now, skew.expected())
        mean_load = sum(counts) / self.num_ranks
        need = mean_load * expected * self.bytes_per_token
        if need <= self.limit_bytes or self._acted_at == self.guard.windows:
            return False
        self._acted_at = self.guard.windows
        words = _("{name}: the fullest rank is to expect {skew:.2f} times the mean load").format(
            name=name, skew=expected
        )
        self.guard.say(words)
        if self.capacity is not None:
            self.capacity(self.limit_bytes / (mean_load * self.bytes_per_token))
        else:
            self.guard.ask_smaller(words)
        return True
