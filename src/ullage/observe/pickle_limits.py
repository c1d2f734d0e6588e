"""What a pickle from outside may ask of this machine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a file may ask of this machine.

    Attributes:
        file_bytes: of the file.
        opcodes: values pushed, kept or built that no sink has taken yet; each takes up to about 100 bytes.
        containers: lists, dicts and tuples among them.

    A block of a snapshot takes about 50 opcodes and 2 containers with its stack (kept recordings: 908,007 opcodes and
    36,232 containers for 19,342 events), so that there is room for half a million blocks; events are taken by sinks.
    """

    file_bytes: int = 2**32
    opcodes: int = 25_000_000
    containers: int = 5_000_000


#: Longest decimal number (protocol 0) and longest binary integer: 64 bits and a sign need 20 digits, 9 bytes.
MAX_DIGITS, MAX_INTEGER_BYTES = 40, 9
#: Longest string.
MAX_TEXT_BYTES = 2**26
MAX_PROTOCOL = 5

PLAIN_TYPES = frozenset({str, bytes, int, float, bool, type(None)})
MISSING = object()
