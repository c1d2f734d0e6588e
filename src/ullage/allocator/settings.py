"""``PYTORCH_ALLOC_CONF``: read it, refuse what PyTorch refuses or silently misreads, and say what would be right."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from ullage.allocator.constants import DEFAULT_LARGE_SEGMENT_BYTES, NUM_ROUNDUP_INTERVALS, UNLIMITED_BYTES
from ullage.allocator.keys import (
    BOOLEAN,
    COUNT,
    DEFAULT_VERSION,
    DIVISIONS,
    FRACTION,
    KEYS,
    MEANT,
    MEGABYTES,
    NEWEST,
    OLDEST,
    RESERVE,
)
from ullage.errors import InputError
from ullage.i18n import _
from ullage.units import MiB

VARIABLE = "PYTORCH_ALLOC_CONF"
#: The variables in the order in which PyTorch looks for them, with the first version whose CUDA allocator does.
#: Source: pytorch@2.13.0:c10/cuda/CUDAAllocatorConfig.h:instance, and the same file of 2.8.0, 2.9.1 and 2.10.0
#: (2.9 reads PYTORCH_ALLOC_CONF for other devices only; a comment in AllocatorConfig.h gives the opposite order).
VARIABLES = {"PYTORCH_CUDA_ALLOC_CONF": (2, 0), "PYTORCH_HIP_ALLOC_CONF": (2, 0), VARIABLE: (2, 10)}

_WITH_UNIT = re.compile(r"([0-9]{1,12})([kKmMgG])(?:i?[bB])?")
_MEBIBYTES = {"k": 1 / 1024, "m": 1, "g": 1024}
#: A number of MiB that no device reaches; more would overflow the bytes in 64 bits.
MAX_MEBIBYTES = 2**30


@dataclass(frozen=True, kw_only=True)
class AllocatorSettings:
    """The settings in force, those that the simulator needs in bytes.

    Attributes:
        text: as it would be written into the variable; empty for the defaults.
        large_segment_size_bytes: segment for requests between 1 and 10 MiB, and page of large expandable segments.
        max_split_size_bytes: blocks of at least this size are not split.
        max_non_split_rounding_bytes: how much larger than the request such a block may be.
        divisions: steps between powers of two, per interval from 1 MiB up; empty for none.
        garbage_collection_threshold: share of the allowed memory above which unused segments are freed; 0: never.
        expandable_segments: whether segments grow.
        memory_fraction: share of the device's memory that may be reserved; ``None``: no limit.
        throw_on_cudamalloc_oom: refuse at that limit at once, without giving cached memory back first.
        padding_bytes: what the allocator adds to each request before rounding: 0 on CUDA.
        alignment_bytes: where large blocks of expandable segments begin: at a multiple of it; 0 on CUDA.
        backend: ``native`` is what is simulated.
        warnings: what is legal and yet does not do what it seems to.
    """

    text: str = ""
    large_segment_size_bytes: int = DEFAULT_LARGE_SEGMENT_BYTES
    max_split_size_bytes: int = UNLIMITED_BYTES
    max_non_split_rounding_bytes: int = DEFAULT_LARGE_SEGMENT_BYTES
    divisions: tuple[int, ...] = ()
    garbage_collection_threshold: float = 0.0
    expandable_segments: bool = False
    memory_fraction: float | None = None
    throw_on_cudamalloc_oom: bool = False
    padding_bytes: int = 0
    alignment_bytes: int = 0
    backend: str = "native"
    warnings: tuple[str, ...] = field(default=(), compare=False)

    def allowed_bytes(self, total_bytes: int | None) -> int:
        """Return what may be reserved under the fraction (source: set_fraction: a product cut to whole bytes)."""
        if total_bytes is None:
            raise InputError(
                _("per_process_memory_fraction is a share of the device's memory, which is not known"),
                remedy=_("give it, for example --capacity 80GiB"),
            )
        return int((1.0 if self.memory_fraction is None else self.memory_fraction) * total_bytes)


def parse_version(text: str) -> tuple[int, int]:
    """Read a version of PyTorch such as ``2.13`` or ``2.9.1+cu128``.

    Raises:
        InputError: not a version, or older than what is known.
    """
    match = re.match(r"v?(\d{1,3})\.(\d{1,3})(?:[.+a-z]|$)", text.strip())
    version = (int(match.group(1)), int(match.group(2))) if match else (0, 0)
    if version < OLDEST:
        raise InputError(
            _("{text!r} is not a version of PyTorch that is known").format(text=text[:40]),
            remedy=_("known are {first} to {last}").format(first=_dotted(OLDEST), last=_dotted(NEWEST)),
        )
    return version


def parse_settings(text: str, *, version: tuple[int, int] = DEFAULT_VERSION) -> AllocatorSettings:
    """Read settings as PyTorch reads them, and refuse what it refuses, ignores or misreads.

    Raises:
        InputError: one sentence with the nearest legal setting.
    """
    entries = split_entries(text)
    values: dict[str, str] = {}
    for key, value in entries:
        _check_key(key, value, version)
        if key in values:
            raise InputError(_("{key} is set twice").format(key=key), remedy=_("keep one of them"))
        values[key] = _checked_value(key, value)
    _check_pairs(values)
    return _effective(values, version)


def split_entries(text: str) -> list[tuple[str, str]]:
    """Split ``a:1,b:[x:2,y:3]`` into its keys and values, without blanks, as ConfigTokenizer does."""
    bare = "".join(text.split())
    if len(bare) > 4096:
        raise InputError(_("the settings are longer than {count} characters").format(count=4096))
    if not bare.isascii():
        raise InputError(_("{text!r} is not plain ASCII").format(text=bare[:60]))
    found = []
    for entry in re.findall(r"(?:\[[^\]]*\]|\[|[^,\[])+", bare):
        key, colon, value = entry.partition(":")
        if not colon or not key or not value or value.count("[") != value.count("]"):
            raise InputError(
                _("{entry!r} is not a setting").format(entry=entry[:60]),
                remedy=_("write for example max_split_size_mb:256,garbage_collection_threshold:0.8"),
            )
        found.append((key, value))
    return found


def _check_key(key: str, value: str, version: tuple[int, int]) -> None:
    known = KEYS.get(key)
    if known is None:
        raise InputError(
            _("PyTorch has no allocator setting {key!r}").format(key=key[:60]), remedy=_nearest_setting(key, value)
        )
    if version < known.since:
        raise InputError(
            _("PyTorch {version} does not know {key}").format(version=_dotted(version), key=key),
            remedy=_("it came with {since}").format(since=_dotted(known.since)),
        )
    if known.until is not None and version > known.until:
        raise InputError(
            _("PyTorch {version} does not know {key} any more").format(version=_dotted(version), key=key),
            remedy=_("it went after {until}: leave it out").format(until=_dotted(known.until)),
        )


def _nearest_setting(key: str, value: str) -> str:
    from difflib import get_close_matches

    name = MEANT.get(key.lower()) or next(iter(get_close_matches(key.lower(), KEYS, 1)), None)
    if name is None:
        return _("known are {known}").format(known=", ".join(KEYS))
    try:
        return _("the nearest legal setting is {setting}").format(setting=f"{name}:{_repaired(name, value)}")
    except InputError:
        return _("the nearest legal setting is {setting}").format(setting=name)


def _repaired(key: str, value: str) -> str:
    """Return the value as the key takes it: without a unit, with a capital, inside the range."""
    kind = KEYS[key].kind
    if kind == MEGABYTES:
        match = _WITH_UNIT.fullmatch(value)
        if match:
            value = str(int(int(match.group(1)) * _MEBIBYTES[match.group(2).lower()]))
        wanted = int(value[:12]) if value.isdigit() else 256
        return str(min(max(wanted, _least_mebibytes(key)), MAX_MEBIBYTES))
    elif kind == BOOLEAN:
        word = {"true": "True", "1": "True", "on": "True", "yes": "True"}.get(value.lower())
        return word or ("False" if value.lower() in ("false", "0", "off", "no") else "True")
    return _checked_value(key, value)


def _least_mebibytes(key: str) -> int:
    if key == "large_segment_size_mb":
        return 11
    return DEFAULT_LARGE_SEGMENT_BYTES // MiB if key in ("max_split_size_mb", "max_non_split_rounding_mb") else 1


def _checked_value(key: str, value: str) -> str:
    """Return the value in its shortest writing, or refuse it."""
    kind = KEYS[key].kind
    if kind == MEGABYTES:
        return _megabytes(key, value)
    if kind == BOOLEAN:
        if value in ("True", "False"):
            return value
        raise _refused(key, value, _("it takes True or False"), _repaired(key, value))
    if kind == FRACTION:
        return _fraction(key, value)
    if kind == DIVISIONS:
        _divisions(value)
        return value
    if kind == COUNT:
        count = int(value) if value.isdigit() and len(value) < 5 else 0
        if count in (1, 2, 4, 8, 16, 32, 64, 128):
            return str(count)
        raise _refused(key, value, _("it takes a power of two up to 128"), "8")
    if kind == RESERVE or value in KEYS[key].words:
        return value
    raise _refused(key, value, _("it takes {words}").format(words=", ".join(KEYS[key].words)), KEYS[key].words[0])


def _megabytes(key: str, value: str) -> str:
    if not value.isdigit() or len(value) > 12:
        match = _WITH_UNIT.fullmatch(value)
        why = _("it takes a whole number of MiB; PyTorch drops the unit without a word") if match else None
        raise _refused(key, value, why or _("it takes a whole number of MiB"), _repaired(key, value))
    least = 11 if key == "large_segment_size_mb" else 1
    if not least <= int(value) <= MAX_MEBIBYTES:
        raise _refused(
            key, value, _("it takes {least} to {most}").format(least=least, most=MAX_MEBIBYTES), _repaired(key, value)
        )
    return str(int(value))


def _fraction(key: str, value: str) -> str:
    closed = key == "per_process_memory_fraction"
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if 0.0 < number < 1.0 or (closed and 0.0 <= number <= 1.0):
        return value
    percent = number / 100 if 1.0 < number < 100.0 else 0.8
    raise _refused(key, value, _("it takes a share between 0 and 1"), f"{percent:g}")


def _divisions(value: str) -> tuple[int, ...]:
    """Return the table of 16 intervals.

    Source: pytorch@2.13.0:c10/core/AllocatorConfig.cpp:parseRoundUpPower2Divisions: what stands before the first
    interval gets its value, ``>`` fills all after the last; what is not named stays 0 (off).
    """
    if not value.startswith("["):
        return (_division(value),) * NUM_ROUNDUP_INTERVALS
    table, last = [0] * NUM_ROUNDUP_INTERVALS, 0
    for at, entry in enumerate(part for part in value.strip("[]").split(",") if part):
        interval, _colon, number = entry.partition(":")
        steps = _division(number)
        if interval == ">":
            for index in range(last + 1, NUM_ROUNDUP_INTERVALS):
                table[index] = steps
            continue
        size = int(interval) if interval.isdigit() and len(interval) < 12 else 0
        if size < 1 or size & (size - 1):
            raise _refused(
                "roundup_power2_divisions", value, _("an interval is a power of two in MiB, or >"), "[256:1,512:2,>:4]"
            )
        last = min(size.bit_length() - 1, NUM_ROUNDUP_INTERVALS - 1)
        if at == 0:
            table[:last] = [steps] * last
        table[last] = steps
    return tuple(table)


def _division(value: str) -> int:
    steps = int(value) if value.isdigit() and len(value) < 9 else 0
    if steps < 1 or steps & (steps - 1):
        nearest = str(1 << max(0, (steps or 4).bit_length() - 1))
        raise _refused("roundup_power2_divisions", value, _("divisions are a power of two"), nearest)
    return steps


def _refused(key: str, value: str, why: str, nearest: str) -> InputError:
    return InputError(
        _("{setting!r} is refused: {why}").format(setting=f"{key}:{value}"[:80], why=why),
        remedy=_("the nearest legal setting is {setting}").format(setting=f"{key}:{nearest}"),
    )


def _check_pairs(values: Mapping[str, str]) -> None:
    """Refuse what must never meet.

    Source: pytorch issue 123548 and pull request 193400: blocks of an expandable segment above max_split_size are
    neither reused nor split, so that the segment grows without end.
    """
    if values.get("expandable_segments") == "True" and "max_split_size_mb" in values:
        raise InputError(
            _("max_split_size_mb and expandable_segments:True together let the reserved memory grow without end"),
            remedy=_("keep one of them"),
        )
    native = sorted(key for key in values if KEYS[key].simulated)
    if values.get("backend") == "cudaMallocAsync" and native:
        raise InputError(
            _("backend:cudaMallocAsync ignores {keys}").format(keys=", ".join(native)),
            remedy=_("leave them out, or use backend:native"),
        )
    least = int(values.get("large_segment_size_mb", DEFAULT_LARGE_SEGMENT_BYTES // MiB))
    for key in ("max_split_size_mb", "max_non_split_rounding_mb"):
        if key in values and int(values[key]) < least:
            why = _("it must be at least large_segment_size_mb, {least}").format(least=least)
            raise _refused(key, values[key], why, str(least))


def _effective(values: Mapping[str, str], version: tuple[int, int]) -> AllocatorSettings:
    large = int(values.get("large_segment_size_mb", DEFAULT_LARGE_SEGMENT_BYTES // MiB)) * MiB
    rounding = values.get("max_non_split_rounding_mb")
    fraction = values.get("per_process_memory_fraction")
    divisions = _divisions(values["roundup_power2_divisions"]) if "roundup_power2_divisions" in values else ()
    return AllocatorSettings(
        text=",".join(f"{key}:{values[key]}" for key in KEYS if key in values),
        large_segment_size_bytes=large,
        max_split_size_bytes=int(values["max_split_size_mb"]) * MiB
        if "max_split_size_mb" in values
        else UNLIMITED_BYTES,
        max_non_split_rounding_bytes=int(rounding) * MiB if rounding else large,
        divisions=divisions,
        garbage_collection_threshold=float(values.get("garbage_collection_threshold", 0.0)),
        expandable_segments=values.get("expandable_segments") == "True",
        memory_fraction=float(fraction) if fraction else None,
        throw_on_cudamalloc_oom=values.get("throw_on_cudamalloc_oom") == "True",
        backend=values.get("backend", "native"),
        warnings=tuple(_warnings(values, version)),
    )


def _warnings(values: Mapping[str, str], version: tuple[int, int]) -> list[str]:
    found = []
    if "garbage_collection_threshold" in values and "per_process_memory_fraction" not in values:
        found.append(_("garbage_collection_threshold does nothing unless a memory fraction is set"))
    if values.get("throw_on_cudamalloc_oom") == "True" and "per_process_memory_fraction" not in values:
        found.append(_("throw_on_cudamalloc_oom does nothing unless a memory fraction is set"))
    if values.get("expandable_segments") == "True":
        found.append(_("expandable segments do not go with CUDA IPC, vLLM's sleep mode, NIXL or NCCL user buffers"))
    if version > NEWEST:
        newest = _dotted(NEWEST)
        found.append(_("PyTorch {version} is newer than what is known, {newest}").format(
            version=_dotted(version), newest=newest))  # fmt: skip
    return found


def normalise(text: str, *, version: tuple[int, int] = DEFAULT_VERSION) -> str:
    """Return legal settings in one writing: one order, no blanks, no trailing comma."""
    return parse_settings(text, version=version).text


def merge(old: str, new: str, *, version: tuple[int, int] = DEFAULT_VERSION) -> str:
    """Return ``old`` with what ``new`` sets: PyTorch reads the whole text anew, so what is not repeated is lost."""
    values = dict(split_entries(old)) | dict(split_entries(new))
    return normalise(",".join(f"{key}:{value}" for key, value in values.items()), version=version)


def from_environment(
    environment: Mapping[str, str], *, version: tuple[int, int] = DEFAULT_VERSION, hip: bool = False
) -> tuple[str | None, str, tuple[str, ...]]:
    """Return the variable that PyTorch reads, its text, and a sentence for each that it does not read."""
    chosen, ignored = None, []
    for name, since in VARIABLES.items():
        if name not in environment or (name == "PYTORCH_HIP_ALLOC_CONF" and not hip):
            continue
        if version < since:
            ignored.append(
                _("PyTorch {version} does not read {name} on a GPU: set {other} too").format(
                    version=_dotted(version), name=name, other=next(iter(VARIABLES))
                )
            )
        elif chosen is None:
            chosen = name
        else:
            ignored.append(_("{name} is not read because {chosen} is set").format(name=name, chosen=chosen))
    return chosen, environment.get(chosen, "") if chosen else "", tuple(ignored)


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
