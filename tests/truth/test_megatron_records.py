"""Megatron-LM's own functional tests and SimuMax's B200 runs against what the room says."""

import json
import statistics

import pytest
from conftest import need_shared

from ullage.engines import megatron
from ullage.read.machine import parse_machine
from ullage.read.megatron_args import job_from_megatron_args, smallest_world
from ullage.records.validate import validate_files


def _pairs():
    """Yield (quantity, id, measured, term) of every record, on the last pipeline stage."""
    for line in need_shared("truth", "megatron.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        job = record["job"]
        args, env = job["native"]["megatron_args"], job["native"].get("env")
        least = smallest_world(args)
        world = job.get("num_gpus") or (8 if 8 % least == 0 else least)
        step = megatron.step(job_from_megatron_args(args, env, machine=parse_machine(f"{world}x{job['gpu']}")))
        rank = max(step.ranks, key=lambda one: one.pp_rank)
        for figure in record["measured"]:
            after = figure["quantity"] == "allocated_after_step"
            ledgers = (rank.after_step,) if after else rank.moments
            terms = [ledger.allocated for ledger in ledgers]
            yield (
                figure["quantity"],
                record["id"],
                figure["bytes"],
                max(term.bytes for term in terms),
                max(term.low_bytes for term in terms),
                max(term.high_bytes for term in terms),
            )


@pytest.fixture(scope="module")
def pairs():
    return list(_pairs())


@pytest.mark.parametrize(
    ("quantity", "median", "ninth_decile"), [("allocated_after_step", 0.005, 0.05), ("max_allocated", 0.01, 0.06)]
)
def test_errors(pairs, quantity, median, ninth_decile):
    errors = sorted(abs(said / measured - 1) for name, _, measured, said, _, _ in pairs if name == quantity)
    assert len(errors) > 200
    assert statistics.median(errors) <= median
    assert errors[int(0.9 * len(errors))] <= ninth_decile


@pytest.mark.parametrize("quantity", ["allocated_after_step", "max_allocated"])
def test_ranges_are_honest(pairs, quantity):
    inside = [low <= measured <= high for name, _, measured, _, low, high in pairs if name == quantity]
    assert sum(inside) / len(inside) >= 0.9


def test_simumax_runs_rank_by_rank(tmp_path):
    """Llama 70B and 405B and DeepSeek-V2 and V3, cut in depth, on eight B200: every rank within one per cent."""
    lines = need_shared("truth", "training.jsonl").read_text(encoding="utf-8").splitlines()
    chosen = [line for line in lines if json.loads(line)["group"] == "simumax-b200"]
    file = tmp_path / "simumax.jsonl"
    file.write_text("\n".join(chosen), encoding="utf-8")
    rows = [row for row in validate_files([file]).comparisons if row.quantity == "max_allocated"]
    errors = sorted(abs(row.error) for row in rows)
    assert len(errors) >= 8 * len(chosen) // 2
    assert statistics.median(errors) <= 0.003 and errors[-1] <= 0.01
    assert sum(bool(row.inside) for row in rows) / len(rows) >= 0.9
