"""Real messages of many programs, each judged by hand: cause, first advice, framework and sizes.

The messages are not part of the project; what was judged is keyed by a hash of the words.
"""

from __future__ import annotations

import hashlib
import io
import json
import re

import pytest
from conftest import need_shared

from ullage.errors import InputError
from ullage.observe.inspection import Inspection, inspect_stream
from ullage.observe.oom import SIZE, read_size

#: hash of the words -> (cause, in the first advice)
JUDGED = {
    "f8bc596a6f0b": ("waiting", "retry"),
    "985d33f3da12": ("waiting", "retry"),
    "9f949e139126": ("capacity", "micro-batch"),
    "51b9abeae228": ("capacity", "flash"),
    "8b497c5a7ba4": ("fragmentation", "expandable_segments"),
    "1a6eb5e4aae0": ("capacity", "flash"),
    "cf20b0d93006": ("waiting", "retry"),
    "3687d489db28": ("capacity", "micro-batch"),
    "0244d6eb01ae": ("fragmentation", "expandable_segments"),
    "660e5db36ca2": ("capacity", "flash"),
    "358c7062bbdd": ("capacity", "flash"),
    "39de6e807c6f": ("fragmentation", "expandable_segments"),
    "f8e42aece0d1": ("other_process", "own GPU"),
    "28918f5271f8": ("capacity", "--gpu-memory-utilization 0.85"),
    "c7dd35baeecd": ("capacity", "micro-batch"),
    "a74ab8f4e155": ("capacity", "flash"),
    "02c1984307dd": ("capacity", "micro-batch"),
    "bcdbfff051c5": ("capacity", "--gpu-memory-utilization 0.85"),
    "6b9c7701d823": ("fragmentation", "expandable_segments"),
    "ea73506bc22c": ("capacity", "micro-batch"),
    "a569e78a33bb": ("other_process", "npu-smi"),
    "e5e63c2ad941": ("kv_pool", "--gpu-memory-utilization 0.95"),
    "21364d7f0d18": ("kv_pool", "--gpu-memory-utilization 0.95"),
    "fa4754eddf7b": ("kv_pool", "--max-model-len 3664"),
    "ad869cfb0648": ("kv_pool", "--max-model-len 15248"),
    "7d49046ad66a": ("kv_pool", "--max-model-len 122080"),
    "5006d72c529d": ("kv_pool", "--mem-fraction-static 0.9"),
    "a6ba4ed983f9": ("capacity", "--mem-fraction-static 0.80"),
    "192d1cdf862e": ("kv_pool", "--mem-fraction-static 0.9"),
    "6787a054011c": ("fragmentation", "--max-batch-prefill-tokens"),
    "975f8b695a18": ("capacity", "smaller batch"),
    "d0ff4fedca3f": ("other_process", "XLA_PYTHON_CLIENT_PREALLOCATE=false"),
    "a787d09a2397": ("capacity", "smaller batch"),
    "7d8e96129b38": ("capacity", "-ngl"),
    "5f7c88905993": ("capacity", "-fa on"),
    "3b4e901d27ab": ("capacity", "-fa on"),
    "11da42b51de7": ("capacity", "-fa on"),
    "d4545bf44d29": ("outside", "room"),
    "575fddd9a0aa": ("outside", "room"),
    "d3916c50b2f3": ("fragmentation", "micro-batch"),
    "45fb9d815e27": ("capacity", "micro-batch"),
    "df5267bc2dc0": ("other_process", "nvidia-smi"),
    "9f9eab96bcf1": ("outside", "--gpu-memory-utilization 0.85"),
}
#: Messages whose arithmetic leaves no other reading; all else must say that it is less than certain.
MAY_BE_CERTAIN = ("kv_pool", "start_budget", "capacity", "other_process", "cap", "host")


def messages() -> list[dict[str, str]]:
    path = need_shared("configs", "oom_messages.jsonl")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def answer(text: str) -> Inspection | None:
    try:
        return inspect_stream(io.BytesIO(text.encode()))
    except InputError:
        return None


def inspected() -> list[tuple[dict[str, str], Inspection | None]]:
    return [(message, answer(message["text"])) for message in messages()]


def test_nearly_all_messages_are_understood() -> None:
    found = inspected()
    understood = sum(inspection is not None for _message, inspection in found)
    print(f"{understood} of {len(found)} understood")
    assert understood >= 0.95 * len(found)


def test_causes_and_first_advice_are_those_judged_by_hand() -> None:
    wrong = []
    for message, found in inspected():
        cause, advice = JUDGED.get(key(message["text"]), ("", ""))
        if found is None or not cause:
            continue
        first = f"{found.advice[0].change} {found.advice[0].flags}"
        if found.cause != cause or advice not in first:
            wrong.append((message["text"][:80], found.cause, cause, first))
    assert wrong == []


def test_the_framework_is_named() -> None:
    for message, found in inspected():
        if found is not None:
            told = message["framework"].lower()
            assert found.framework in told or found.allocator in told, (told, found.framework, found.allocator)


def test_every_printed_size_is_read() -> None:
    for message, found in inspected():
        if found is None or found.facts[0].kind != "device_oom" or found.partial:
            continue
        read = {size.bytes for _name, size in found.facts[0].sizes}
        read |= {size.bytes for _number, size in found.facts[0].processes}
        printed = {read_size(each).bytes for each in re.findall(SIZE, message["text"])}
        assert printed <= read, message["text"]


def test_certain_is_said_only_where_the_figures_leave_no_other_reading() -> None:
    for message, found in inspected():
        if found is None or found.confidence != "certain":
            continue
        assert found.cause in MAY_BE_CERTAIN, message["text"]
        sizes = dict(found.sizes)
        if found.cause == "capacity" and "capacity" in sizes:
            reserved = sizes["allocated"] + sizes.get("unallocated", 0)
            outside = max(0, sizes.get("process_used", reserved) - reserved)
            assert sizes["requested"] + sizes["allocated"] + outside > sizes["capacity"]
        if found.cause == "other_process":
            assert sum(size.bytes for _number, size in found.facts[0].processes) > sizes["capacity"] // 2


@pytest.mark.parametrize("cut", [0.3, 0.6, 0.9])
def test_cut_messages_are_answered_or_refused(cut: float) -> None:
    for message in messages():
        words = message["text"][: int(cut * len(message["text"]))]
        found = answer(words)
        assert found is None or found.advice
