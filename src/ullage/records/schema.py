"""A measured run as data: the job in its own words, what was measured, and where it was published."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Any

from ullage.errors import InputError
from ullage.frozen import Frozen
from ullage.i18n import _

#: Quantities in bytes. Another name is kept, and is memory when its unit is one of memory.
MEMORY_QUANTITIES = frozenset(
    [
        "activation_peak",
        "allocated_after_step",
        "available_after_weights",
        "available_before_weights",
        "cuda_graphs",
        "device_used",
        "kv_cache",
        "max_active",
        "max_allocated",
        "max_reserved",
        "non_torch",
        "total",
        "weights",
    ]
)
COUNT_QUANTITIES = frozenset(["kv_cache_tokens", "max_concurrency", "num_gpu_blocks"])
#: Sizes of the units that records are written in. GB is taken by its own ``gib`` field: engines print 2**30 as GB.
UNIT_BYTES = {"bytes": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
#: Figures in GiB and GB are logged with two digits at least; JSON drops trailing zeros, so fewer means just that.
LOGGED_DIGITS = 2

RECORD_KEYS = frozenset(
    ["id", "group", "completeness", "job", "measured", "fits_in_gib", "source_url", "source", "quote", "license"]
)
KERNEL_KEYS = frozenset(["kernel", "provider", "mode", "params", "gpu", "version"])
MEASURED_KEYS = frozenset(["quantity", "value", "unit", "gib", "gib_range", "bytes", "rank", "per_rank", "note"])


class Measured(Frozen):
    """One figure of a record.

    Attributes:
        quantity: name of the truth files.
        value, low, high: in bytes or counts; ``low..high`` is what the published digits leave open.
        is_bytes: memory, or a count.
        rank: ``0``, ``max``, ``last``, ``all``, another number, or None.
        per_rank: (rank, value) pairs where the source gives each rank's or device's figure.
        note: words of the record.
    """

    quantity: str
    value: float
    low: float
    high: float
    is_bytes: bool
    rank: str | None = None
    per_rank: tuple[tuple[str, float], ...] = ()
    note: str = ""

    @property
    def rounding(self) -> float:
        """Half a unit of the last published digit."""
        return (self.high - self.low) / 2


class Record(Frozen):
    """A published run.

    Attributes:
        record_id, group: name of the record, and of the source it has in common with near-twins.
        kind: ``serve``, ``train``, or ``kernel``.
        completeness: full, mostly or partial.
        job: the job's fields as written.
        measured: the figures; ``fits_in_gib`` for a job only known to fit.
        quote: the passage of the source that the record was taken from.
        where: file and line.
        unknown_keys: keys that the schema does not know, as paths.
    """

    record_id: str
    group: str
    kind: str
    completeness: str
    job: Mapping[str, Any]
    measured: tuple[Measured, ...]
    fits_in_gib: float | None = None
    source_url: str = ""
    quote: str = ""
    where: str = ""
    unknown_keys: tuple[str, ...] = field(default=())

    @property
    def engine(self) -> str:
        """The engine as the record writes it."""
        return str(self.job.get("engine") or self.job.get("provider") or "unknown")


def read_record(values: Mapping[str, Any], where: str) -> Record:
    """Read one record.

    Raises:
        InputError: a field that must be there is missing or has the wrong type.
    """
    is_kernel = "kernel" in values
    job = {key: values[key] for key in KERNEL_KEYS if key in values} if is_kernel else _object(values, "job", where)
    figures = values.get("measured") or []
    if not isinstance(figures, list):
        raise InputError(_("measured is not a list"), where=where)
    unknown = [key for key in values if key not in RECORD_KEYS and not (is_kernel and key in KERNEL_KEYS)]
    for figure in figures:
        if not isinstance(figure, dict):
            raise InputError(_("a measured figure is not an object"), where=where)
        unknown += [f"measured.{key}" for key in figure if key not in MEASURED_KEYS]
    fits_in_gib = values.get("fits_in_gib")
    if fits_in_gib is not None:
        fits_in_gib = _number(fits_in_gib, "fits_in_gib", where)
    return Record(
        record_id=_text(values, "id", where),
        group=_text(values, "group", where),
        kind="kernel" if is_kernel else _text(job, "kind", where),
        completeness=_text(values, "completeness", where, default="full"),
        job=job,
        measured=tuple(_measured(figure, where) for figure in figures),
        fits_in_gib=fits_in_gib,
        source_url=_text(values, "source_url", where, default=""),
        quote=str(values.get("quote") or ""),
        where=where,
        unknown_keys=tuple(unknown),
    )


def _measured(figure: Mapping[str, Any], where: str) -> Measured:
    quantity = _text(figure, "quantity", where)
    value = _number(figure.get("value"), "measured.value", where)
    unit = _text(figure, "unit", where, default="")
    is_bytes = quantity in MEMORY_QUANTITIES or (quantity not in COUNT_QUANTITIES and unit in (*UNIT_BYTES, "GB", "MB"))
    scale = _bytes_of_unit(figure, value, unit, where) if is_bytes else 1.0
    half = _half_digit(value, unit) * scale
    low, high = value * scale - half, value * scale + half
    both_readings = figure.get("gib_range")
    if both_readings is not None:
        readings = [_number(reading, "measured.gib_range", where) * 2**30 for reading in _list(both_readings, where)]
        low, high = min([low, *readings]), max([high, *readings])
    rank = figure.get("rank")
    return Measured(
        quantity=quantity,
        value=value * scale,
        low=low,
        high=high,
        is_bytes=is_bytes,
        rank=None if rank is None else str(rank),
        per_rank=_per_rank(figure.get("per_rank") or [], scale, where),
        note=_text(figure, "note", where, default=""),
    )


def _per_rank(value: Any, scale: float, where: str) -> tuple[tuple[str, float], ...]:
    """Read ``[1.5, 1.4]``, or ``{"0": 1.5, "3": 1.4}`` where only some ranks were measured."""
    if not isinstance(value, dict):
        value = {str(rank): one for rank, one in enumerate(_list(value, where))}
    return tuple((str(rank), _number(one, "measured.per_rank", where) * scale) for rank, one in value.items())


def _bytes_of_unit(figure: Mapping[str, Any], value: float, unit: str, where: str) -> float:
    if unit in UNIT_BYTES:
        return float(UNIT_BYTES[unit])
    gib = figure.get("gib")
    if gib is None and figure.get("gib_range"):
        gib = _number(_list(figure["gib_range"], where)[0], "measured.gib_range", where)
    if gib is None:
        raise InputError(
            _("unit {unit!r} of a figure has no size").format(unit=unit[:40]), where=where, remedy=_("give gib as well")
        )
    gib = _number(gib, "measured.gib", where)
    # Rounded digits of gib must not blur the value itself, so the ratio is taken to the nearest known unit.
    for factor in (2**30, 10**9, 2**20, 10**6, 1):
        if value and abs(gib * 2**30 / value / factor - 1) < 0.005:
            return float(factor)
    return gib * 2**30 / value if value else float(2**30)


def _half_digit(value: float, unit: str) -> float:
    text = repr(value)
    digits = len(text.partition(".")[2]) if "e" not in text and not value.is_integer() else 0
    if unit in ("GiB", "GB", "x"):
        digits = max(digits, LOGGED_DIGITS)
    elif unit in ("bytes", "B"):
        return 0.0
    return 0.5 * 10.0**-digits


def _object(values: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    value = values.get(key)
    if not isinstance(value, dict):
        raise InputError(_("{key} is missing or not an object").format(key=key), where=where)
    return value


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list) or len(value) > 100_000:
        raise InputError(_("{value} is not a list").format(value=repr(value)[:60]), where=where)
    return value


def _text(values: Mapping[str, Any], key: str, where: str, *, default: str | None = None) -> str:
    value = values.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise InputError(_("{key} is missing or not a string").format(key=key), where=where)
    return value


def _number(value: Any, key: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > 2**63:
        raise InputError(_("{key}: {value} is not a number").format(key=key, value=repr(value)[:60]), where=where)
    return float(value)
