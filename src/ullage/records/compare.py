"""Prediction against measurement: figure by figure, and whether the job starts at all."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import field

from ullage.engines.serving import Amount
from ullage.errors import EXIT_USAGE, UllageError
from ullage.frozen import Frozen
from ullage.i18n import _
from ullage.records.schema import Measured, Record

#: A note that says a figure is that of several replicas together; rooms answer for one.
_SUM_OVER_REPLICAS = re.compile(r"sum over the (\d{1,4}) DP ranks")


class NotComparableError(UllageError):
    """A record that cannot be predicted for a reason that lies in the record; the text says why."""

    exit_code = EXIT_USAGE


class Prediction(Frozen):
    """What the accounting says of a record's job.

    Attributes:
        engine: the engine room that answered.
        figures: by quantity, of the rank that the engine's own log speaks of: bytes or counts.
        ranks: the same by rank number, where ranks are told apart; may be empty.
        starts: whether the job gets through its start; ``reason`` why not. None when that cannot be said.
        doubt: why the start may come out the other way inside the range; empty when the answer is sure.
        not_comparable: quantities of this record that cannot be judged, and why.
    """

    engine: str
    figures: Mapping[str, Amount]
    ranks: tuple[Mapping[str, Amount], ...] = ()
    starts: bool | None = None
    reason: str = ""
    doubt: str = ""
    not_comparable: Mapping[str, str] = field(default_factory=dict)


class Comparison(Frozen):
    """One measured figure beside its prediction.

    Attributes:
        measured: bytes or counts.
        predicted, low, high: None when skipped. ``low..high`` is the printed range, widened by the half digit that
            the publication rounded away.
        skipped: why the figure was not judged; None when it was.
        failed: it was skipped because the program could not do it (a bug or a gap), not because of the record.
    """

    record_id: str
    group: str
    engine: str
    quantity: str
    rank: str | None
    is_bytes: bool
    measured: float
    predicted: float | None = None
    low: float | None = None
    high: float | None = None
    skipped: str | None = None
    failed: bool = False

    @property
    def error(self) -> float | None:
        """Signed relative error: (predicted - measured) / measured; None when skipped.

        None too for a measured figure that is not positive: engines log differences of free memory, which come out
        negative when memory was given back meanwhile. Such a figure has a place in a range, but no relative error.
        """
        if self.predicted is None or self.measured <= 0:
            return None
        return (self.predicted - self.measured) / self.measured

    @property
    def inside(self) -> bool | None:
        """The measured figure lies in the range; None when skipped."""
        if self.low is None or self.high is None:
            return None
        return self.low <= self.measured <= self.high


class Verdict(Frozen):
    """What came of a start, and what was predicted.

    ``tight``: the range of the figures holds both outcomes, so neither was promised.
    """

    record_id: str
    group: str
    engine: str
    measured: bool
    predicted: bool | None
    tight: bool = False
    reason: str = ""
    skipped: str | None = None

    @property
    def wrong(self) -> bool:
        """A sure prediction was made, and the run contradicts it."""
        return self.predicted is not None and not self.tight and self.predicted != self.measured

    @property
    def came(self) -> str:
        """What came of the start, in words."""
        return _("it started") if self.measured else _("it failed to start")


def compare(record: Record, prediction: Prediction) -> Iterator[Comparison]:
    """Yield a comparison per measured figure, and per rank where the record gives each rank's figure."""
    for measured in record.measured:
        why = prediction.not_comparable.get(measured.quantity)
        if why:
            yield skipped(record, measured, why, engine=prediction.engine)
        elif measured.per_rank:
            yield from _by_rank(record, measured, prediction)
        else:
            amount = _amount(measured, prediction)
            if amount is None:
                reason = _("the {engine} room does not predict {quantity}").format(
                    engine=prediction.engine, quantity=measured.quantity
                )
                yield skipped(record, measured, reason, engine=prediction.engine, failed=True)
            else:
                yield _compared(record, measured, prediction.engine, measured.rank, measured.value, amount)


def skipped(
    record: Record, measured: Measured, why: str, *, engine: str | None = None, failed: bool = False
) -> Comparison:
    """Return the row of a figure that is not judged."""
    return Comparison(
        record_id=record.record_id,
        group=record.group,
        engine=engine or record.engine,
        quantity=measured.quantity,
        rank=measured.rank,
        is_bytes=measured.is_bytes,
        measured=measured.value,
        skipped=why,
        failed=failed,
    )


def started(record: Record) -> bool | None:
    """Return whether the job came up, as far as the record says: None when it does not.

    A note or an ``outcome`` flag that speaks of failure, or a cache of negative size, means no. A cache, graphs or
    the use after start, measured without such a note, means yes: an engine prints them last.
    """
    outcome = str((record.job.get("flags") or {}).get("outcome", "")) if _is_object(record.job.get("flags")) else ""
    words = " ".join([outcome, *(figure.note for figure in record.measured)]).lower()
    if "start fails" in words or "out of memory" in words:
        return False
    if any(figure.quantity == "kv_cache" and figure.value < 0 for figure in record.measured):
        return False
    if any(figure.quantity in ("kv_cache", "max_concurrency", "device_used") for figure in record.measured):
        return True
    return None


def _is_object(value: object) -> bool:
    return isinstance(value, Mapping)


def _by_rank(record: Record, measured: Measured, prediction: Prediction) -> Iterator[Comparison]:
    quantity, engine, ranks = measured.quantity, prediction.engine, prediction.ranks
    numbers = [int(rank) if rank.isdecimal() else len(ranks) for rank, _value in measured.per_rank]
    if max(numbers) >= len(ranks):
        reason = _("{measured} ranks were measured, {predicted} predicted").format(
            measured=len(numbers), predicted=len(ranks)
        )
        yield skipped(record, measured, reason, engine=engine, failed=True)
        return
    for number, (rank, value) in zip(numbers, measured.per_rank, strict=True):
        if quantity in ranks[number]:
            yield _compared(record, measured, engine, rank, value, ranks[number][quantity])
        else:
            reason = _("the {engine} room does not predict {quantity}").format(engine=engine, quantity=quantity)
            yield skipped(record, measured, reason, engine=engine, failed=True)
            return


def _amount(measured: Measured, prediction: Prediction) -> Amount | None:
    quantity, ranks = measured.quantity, prediction.ranks
    per_rank = [amounts[quantity] for amounts in ranks if quantity in amounts]
    if measured.rank == "all" and len(per_rank) == len(ranks) > 0:
        return Amount(
            value=sum(one.value for one in per_rank),
            low=sum(one.low for one in per_rank),
            high=sum(one.high for one in per_rank),
        )
    if measured.rank == "max" and per_rank:
        return max(per_rank, key=lambda one: one.value)
    if measured.rank == "last" and ranks:
        return ranks[-1].get(quantity)
    if measured.rank and measured.rank.isdecimal() and int(measured.rank) > 0 and int(measured.rank) < len(ranks):
        return ranks[int(measured.rank)].get(quantity)
    replicas = _SUM_OVER_REPLICAS.search(measured.note)
    amount = prediction.figures.get(quantity) or (ranks[0].get(quantity) if ranks else None)
    if amount and replicas:
        times = int(replicas.group(1))
        return Amount(value=times * amount.value, low=times * amount.low, high=times * amount.high)
    return amount


def _compared(
    record: Record, measured: Measured, engine: str, rank: str | None, value: float, amount: Amount
) -> Comparison:
    return Comparison(
        record_id=record.record_id,
        group=record.group,
        engine=engine,
        quantity=measured.quantity,
        rank=rank,
        is_bytes=measured.is_bytes,
        measured=value,
        predicted=amount.value,
        low=amount.low - (measured.value - measured.low),
        high=amount.high + (measured.high - measured.value),
    )
