"""The guard around a training loop: each window of micro-batches goes through on every rank, or is redone smaller.

A window is all the samples of one optimizer step on this rank. See ``docs/guard.md``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from ullage.errors import InputError, MissingExtraError
from ullage.guard import ladder as rungs
from ullage.guard.classify import Failure, classify
from ullage.guard.outcome import CannotFit, RestartRequired
from ullage.guard.plan import Plan
from ullage.guard.release import release_exception, release_memory
from ullage.guard.settings import Settings
from ullage.guard.sizes import Raiser, bounded, known_shapes, micro_batch_for
from ullage.guard.split import Piece, num_samples, ranges, shape_of, split_batch, weigh
from ullage.guard.store import PlanStore
from ullage.guard.votes import OK, OPTIMIZER, REDO, SHRINK, Tally
from ullage.i18n import _

log = logging.getLogger("ullage.guard")


class Guard:
    """Keeps a training loop alive: shrinks instead of dying, with the global batch, and so the weights, unchanged.

    >>> guard = ullage.guard.Guard(model, optimizer, micro_batch=8)
    >>> for batch in loader:
    ...     loss = guard.step(batch, lambda micro: loss_of(model, micro))

    The keyword arguments are those of :class:`ullage.guard.settings.Settings`. ``step`` runs the micro-batches
    forward and backward, clips, steps the optimizer and clears the gradients.
    """

    def __init__(self, model: Any, optimizer: Any, **settings: Any) -> None:
        try:
            import torch  # noqa: F401

            from ullage.guard import checks
            from ullage.guard.budget import Budget
            from ullage.guard.state import WindowState
            from ullage.guard.switches import Switches
            from ullage.guard.votes import Votes
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] == "torch":
                raise MissingExtraError("torch", "torch") from error
            raise
        self.settings = Settings(**settings)
        self.model, self.optimizer = model, optimizer
        self.parameters = list(model.parameters())
        checks.check(model, optimizer)
        self.votes = Votes(self.settings.group)
        self.parallel = checks.parallel_of(model, self.votes, always_vote=self.settings.votes == "always")
        checks.check_schedule(self.parallel, self.settings)
        self.budget = Budget(self.settings.reserve, self.settings.memory_fraction)
        self.state = WindowState(model)
        self.switches = Switches(model, self.settings.recompute, self.settings.offload)
        self.raiser = Raiser(self.settings.raise_after)
        self.store = self.settings.store or PlanStore.from_environment()
        self.ladder = rungs.Ladder(
            min_micro_batch=self.settings.min_micro_batch,
            recompute=self.settings.recompute is not None,
            offload=self.settings.offload is not None,
            restart_plans=tuple(self.settings.restart_plans),
            can_restart=self.store is not None,
        )
        self.steps = self.windows = self.redone = 0
        self.micro_batch = self.settings.micro_batch
        self._advice = ""
        self.plan = self._first_plan()
        self.switches.apply(self.plan)
        self._check_start()

    def _check_start(self) -> None:
        """Refuse what the ledger says cannot fit; say what a smaller micro-batch changes."""
        from ullage.guard.checks import check_fit

        refusal = check_fit(self.settings.job, self.settings.reserve)
        if refusal:
            raise CannotFit(self.plan, refusal)
        if self.state.uses_batch_statistics:
            self.say(_("batch norms see micro-batches: their statistics change with the micro-batch"))

    def _first_plan(self) -> Plan:
        """Return the plan of rank 0, for all; a store that cannot be read is named, on every rank."""
        found: Any = Plan()
        if self.store is not None and self.votes.rank == 0:
            try:
                found = self.store.load() or Plan()
            except InputError as error:
                found = error
        found = self.votes.exchange(found if self.votes.rank == 0 else None)[0] if self.votes.size > 1 else found
        if isinstance(found, Exception):
            raise found
        if found.generation:
            self.say(_("goes on with plan {number}: {reason}").format(number=found.generation, reason=found.reason))
        return found  # type: ignore[no-any-return]

    def say(self, words: str) -> None:
        """Log a sentence, and hand it to ``on_event``."""
        log.warning("%s", words)
        if self.settings.on_event:
            self.settings.on_event(words)

    # ---------------------------------------------------------------- the window

    def step(self, batch: Any, loss_fn: Callable[[Any], Any]) -> Any:
        """Run one window whose samples are ``batch``; return the loss of the whole batch."""
        return self.step_window([batch], loss_fn)

    def step_window(self, batches: Sequence[Any], loss_fn: Callable[[Any], Any]) -> Any:
        """Run one window made of several batches of the loader."""
        loss = self.gradients(batches, loss_fn)
        self.update()
        return loss

    def gradients(self, batches: Sequence[Any], loss_fn: Callable[[Any], Any]) -> Any:
        """Run the window up to its gradients, as often as it takes."""
        self.windows += 1
        self.state.take()
        self.budget.begin(self.windows)
        shape = max(map(self.settings.shape or shape_of, batches))
        retried = False
        while True:
            loss, failure, voted = self._attempt(batches, loss_fn, shape)
            tally = self._agree(failure, shape, voted)
            if tally.code < REDO:
                break
            retried = self._recover(self.votes.exchange(failure), retried)
        self.parallel.good()
        self._after_good(tally)
        return loss

    def vote_point(self) -> None:
        """Call before each collective of your own inside ``loss_fn``: it raises where another rank will not join it."""
        self.parallel.vote_point()

    def _attempt(self, batches: Sequence[Any], loss_fn: Any, shape: int) -> tuple[Any, Failure | None, bool]:
        """Return (loss, failure, whether this rank has voted on it)."""
        self.micro_batch = micro_batch_for(self.plan, shape, self.settings.micro_batch)
        pieces = self._pieces(batches)
        failure, loss = None, None
        try:
            loss = self._run(batches, pieces, loss_fn)
        except Exception as error:
            failure = classify(error, phase="forward or backward", rank=self.votes.rank)
            if failure is None:
                raise
            release_exception(error)
        if failure is None:
            return loss, None, False
        kept = {**failure.__dict__, "shape": shape, "micro_batch": self.micro_batch}
        kept.pop("_hash", None)
        release_memory(self.parameters)
        return None, Failure(**kept), self.parallel.join()

    def _pieces(self, batches: Sequence[Any]) -> list[Piece]:
        """Cut the window, weigh its pieces, and pad it where other ranks have more micro-batches."""
        measure = self.settings.num_samples or num_samples
        cut = [(at, *ends) for at, each in enumerate(batches) for ends in ranges(measure(each), self.micro_batch)]
        counts = [stop - start for _at, start, stop in cut]
        if self.settings.count is not None:
            split = self.settings.split or split_batch
            counts = [int(self.settings.count(split(batches[at], start, stop))) for at, start, stop in cut]
        num = self.parallel.begin(len(cut))
        weights = weigh(counts, of=self._total(sum(counts)), reduction=self.settings.loss_reduction)
        if self.settings.normalize == "global":
            weights = [weight * self.votes.size for weight in weights]
        pieces = [
            Piece(batch=at, start=start, stop=stop, weight=weight)
            for (at, start, stop), weight in zip(cut, weights, strict=True)
        ]
        return pieces + [Piece(batch=0, start=0, stop=1, weight=0.0)] * (num - len(pieces))

    def _total(self, number: int) -> int:
        return self.votes.total(number) if self.settings.normalize == "global" else number

    def _run(self, batches: Sequence[Any], pieces: Sequence[Piece], loss_fn: Any) -> Any:
        """Run the micro-batches forward and backward; return the weighted sum of their losses."""
        split, total = self.settings.split or split_batch, None
        if self.settings.schedule:
            return loss_fn([(split(batches[each.batch], each.start, each.stop), each.weight) for each in pieces])
        for number, piece in enumerate(pieces):
            with self.parallel.micro(number == len(pieces) - 1):
                micro = split(batches[piece.batch], piece.start, piece.stop)
                with self.switches.forward():
                    loss = loss_fn(micro)
                    loss = loss if piece.weight == 1.0 else loss * piece.weight
                self._backward(loss)
            total = loss.detach() if total is None else total + loss.detach()
            del micro, loss
        return total

    def _backward(self, loss: Any) -> None:
        if self.settings.backward is not None:
            self.settings.backward(loss)
        elif self.settings.scaler is not None:
            self.settings.scaler.scale(loss).backward()
        else:
            loss.backward()

    def _agree(self, failure: Failure | None, shape: int, voted: bool) -> Tally:
        """Vote at the end of the window: before the optimizer's step, and before any collective of it."""
        if voted:
            return Tally(code=REDO)
        code = REDO if failure is not None else SHRINK if self._advice else OK
        limit = self.settings.micro_batch
        room = self.micro_batch < limit and self.budget.no_room(self.micro_batch, min(limit, 2 * self.micro_batch))
        return self.votes.vote(code, shape=shape, no_room=room)

    # ---------------------------------------------------------------- after a failure

    def _recover(self, gathered: Sequence[Failure | None], retried: bool) -> bool:
        """Release, agree on the next plan, and bring the window back to its start; True after a plain retry."""
        failures = [failure for failure in gathered if failure is not None]
        self._clear()
        following = self.ladder.after(self.plan, failures, retried=retried)
        for shape in known_shapes(following.plan):
            if known_shapes(following.plan)[shape] < known_shapes(self.plan).get(shape, self.settings.micro_batch + 1):
                self.raiser.failed(shape)
        self._take_step(following, failures)
        self.redone += 1
        return following.action == rungs.RETRY

    def _clear(self) -> None:
        """Throw the window's gradients away and restore what its forwards changed."""
        self.parallel.reset()
        scaler = self.settings.scaler
        if scaler is not None:
            scaler._per_optimizer_states.clear()
        release_memory(self.parameters)
        self.state.put_back()

    def _take_step(self, following: rungs.Step, failures: Sequence[Failure], *, whole: bool = True) -> None:
        """Do what the ladder says; ``whole``: the weights are those of the last good step."""
        if following.action == rungs.CANNOT_FIT:
            raise CannotFit(self.plan, self._cannot_fit(failures))
        self.change_plan(following.plan)
        if following.action == rungs.RESTART:
            if self.settings.before_restart is not None and whole:
                self.settings.before_restart()
            words = _("restart with plan {number}: {reason}")
            raise RestartRequired(self.plan, words.format(number=self.plan.generation, reason=self.plan.reason))
        if following.action == rungs.RETRY:
            self.say(_("{reason}: once more, unchanged").format(reason=rungs.describe(failures)))

    def _cannot_fit(self, failures: Sequence[Failure]) -> str:
        from ullage.guard.checks import as_fit, ledger_words

        own = next((failure for failure in failures if failure.kind != "peer"), None)
        knobs = ", ".join(f"{name}={value}" for name, value in self.plan.knobs) or _("the first plan")
        words = [
            _("CANNOT FIT: the smallest plan ran out of memory ({knobs})").format(knobs=knobs),
            _("micro-batch {size}, on rank {rank}: {text}").format(
                size=self.micro_batch, rank=own.rank if own else 0, text=own.text if own else ""
            ),
        ]
        if self.settings.job is not None:
            fit = as_fit(self.settings.job, self.settings.reserve)
            words.append(_("the ledger says: {need}").format(need=ledger_words(fit)))
        return "; ".join(words)

    def change_plan(self, plan: Plan) -> None:
        """Go on with another plan: save it (rank 0), switch on what it asks for, and say why."""
        if plan.generation == self.plan.generation:
            return
        self.plan = bounded(plan)
        self.switches.apply(self.plan)
        self.say(_("plan {number}: {reason}").format(number=plan.generation, reason=plan.reason))
        if self.store is None or self.votes.rank:
            return
        try:
            self.store.save(self.plan)
        except InputError as error:
            self.say(str(error))

    # ---------------------------------------------------------------- after a good window

    def ask_smaller(self, reason: str) -> None:
        """Ask for half the micro-batch from the next window on; all ranks follow one that asks."""
        self._advice = reason

    def _after_good(self, tally: Tally) -> None:
        for words in self.budget.end(self.windows):
            self.say(words)
        sizes = known_shapes(self.plan)
        limit = min(self.settings.micro_batch, int(self.plan.get("micro_batch", self.settings.micro_batch)))
        current = micro_batch_for(self.plan, tally.shape, limit)
        if tally.code == SHRINK:
            self._advice = ""
            smaller = max(self.settings.min_micro_batch, current // 2)
            if smaller < current:
                words = _("asked for: micro-batch {old} to {new}").format(old=current, new=smaller)
                self.change_plan(self.plan.shrunk(words, **rungs.shape_knob(tally.shape, smaller)))
            return
        holding = [shape for shape, size in sizes.items() if shape <= tally.shape and size == current < limit]
        for shape in sorted(holding)[:1]:
            if not self.raiser.succeeded(shape):
                continue
            if tally.no_room:
                self.raiser.put_off(shape)
            else:
                self.change_plan(self.raiser.raise_(self.plan, shape, current, limit))

    # ---------------------------------------------------------------- the optimizer

    def update(self, update: Callable[[], Any] | None = None) -> None:
        """Clip, step the optimizer, clear the gradients (or do ``update``); a failure is never pretended away."""
        failure = None
        try:
            (update or self._update)()
        except Exception as error:
            failure = classify(error, phase="optimizer step", rank=self.votes.rank)
            if failure is None:
                raise
            release_exception(error)
        tally = self.votes.vote(OPTIMIZER if failure is not None else OK)
        if tally.code >= REDO:
            self._optimizer_failed([each for each in self.votes.exchange(failure) if each is not None])
            return
        self.steps += 1
        checkpoint = self.settings.checkpoint
        if checkpoint is not None and self.steps % checkpoint.every == 0:
            self.save_checkpoint()

    def _update(self) -> None:
        scaler, clip = self.settings.scaler, self.settings.max_grad_norm
        if scaler is not None and (clip is not None or self.settings.clip is not None):
            scaler.unscale_(self.optimizer)
        if self.settings.clip is not None:
            self.settings.clip()
        elif clip is not None:
            self.parallel.clip(self.parameters, clip)
        scale = scaler.get_scale() if scaler is not None else 0.0
        if scaler is not None:
            scaler.step(self.optimizer)
            scaler.update()
        else:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.settings.scheduler is not None and (scaler is None or scaler.get_scale() >= scale):
            self.settings.scheduler.step()

    def _parts(self) -> dict[str, Any]:
        settings = self.settings
        return {
            "model": self.parallel.saved(self.model),
            "optimizer": self.optimizer,
            "scheduler": settings.scheduler,
            "scaler": settings.scaler,
        }

    def save_checkpoint(self) -> None:
        """Write the guard's checkpoint now."""
        problem = self.settings.checkpoint.save(self.votes, self.steps, self._parts())
        if problem:
            self.say(problem)

    def load_checkpoint(self) -> Any:
        """Restore the last checkpoint; return the position that was saved with it, or None where there is none."""
        checkpoint = self.settings.checkpoint
        if checkpoint is None or not checkpoint.exists(self.votes):
            return None
        self.steps, position = checkpoint.restore(self.votes, self._parts())
        return position

    def _optimizer_failed(self, failures: Sequence[Failure]) -> None:
        """Some weights or states may have been changed and others not: only a checkpoint or a restart helps."""
        self._clear()
        following = self.ladder.after_optimizer(self.plan, failures)
        rewind, checkpoint = self.settings.rewind, self.settings.checkpoint
        possible = following.action == rungs.REDO and rewind is not None and checkpoint is not None
        if possible and rewind is not None and checkpoint.exists(self.votes):
            self._take_step(following, failures)
            position = self.load_checkpoint()
            self.say(_("the optimizer's step ran out of memory: back at step {step}").format(step=self.steps))
            rewind(position)
            return
        if following.action == rungs.REDO:
            following = rungs.Step(
                action=rungs.RESTART if self.ladder.can_restart else rungs.CANNOT_FIT, plan=following.plan
            )
        self._take_step(following, failures, whole=False)
