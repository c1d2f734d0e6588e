"""One store for both who shrink: the guard in the job, and ``ullage run`` after an out-of-memory that no guard saw."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ullage.guard.plan import Plan
from ullage.guard.run.shrink import Setting, smaller, with_plan
from ullage.guard.sizes import micro_batch_for
from ullage.guard.store import PlanStore

from test_run_deaths import OOM, ended, judge, traceback  # isort: skip

TRAINER = ("torchrun", "train.py", "--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "1")


def after(words, **knobs):
    setting = with_plan(words, Plan(generation=3, knobs=tuple(knobs.items())))
    change = smaller(setting, judge(ended(traceback(OOM))), words)
    return None if change is None else change.setting


def test_an_unguarded_death_goes_below_what_the_guard_has_reached():
    """The guard runs 4 of the 8 that the flags say: 4 once more would change nothing."""
    found = after(TRAINER, **{"micro_batch@64": 4})
    assert found.words[3] == "2" and found.words[5] == "4", "the global batch stays 8"
    assert micro_batch_for(found.plan, 64, 8) == 2
    assert found.plan.generation == 4


def test_knobs_and_shapes_of_one_plan_are_read_together():
    found = after(("python", "train.py"), **{"micro_batch": 8, "grad_accum": 2, "micro_batch@64": 4})
    assert (found.plan.get("micro_batch"), found.plan.get("grad_accum")) == (2, 8)


def test_a_plan_of_the_guard_alone_gets_no_accumulation():
    """The guard cuts the window that it is given: an accumulation beside it would be one too many."""
    found = after(("python", "train.py"), **{"micro_batch@64": 4})
    assert dict(found.plan.knobs) == {"micro_batch@64": 4, "micro_batch": 2}
    assert "guard" in found.plan.reason


def test_a_guard_at_its_smallest_is_not_shrunk_by_flags():
    found = after((*TRAINER, "--gradient_checkpointing", "false"), **{"micro_batch@64": 1})
    assert found.plan.get("recompute") == "full" and found.plan.get("grad_accum") is None


def test_a_kept_plan_of_the_guard_leaves_the_flags_alone():
    """The window is that of the flags; the guard cuts it by itself."""
    assert with_plan(TRAINER, Plan(generation=1, knobs=(("micro_batch@64", 4),))) == Setting(
        plan=Plan(generation=1, knobs=(("micro_batch@64", 4),)), words=TRAINER
    )


JOB = """
import os, sys
import torch
import ullage

attempt = int(os.environ["ULLAGE_ATTEMPT"])
model = torch.nn.Linear(4, 1)
guard = ullage.guard.Guard(model, torch.optim.SGD(model.parameters(), lr=0.1), micro_batch=8,
                           restart_plans=({"zero_stage": 3},))
sizes = []

def loss_of(micro):
    sizes.append(len(micro))
    limit = {1: 4, 2: 0, 3: 8}[attempt]
    if len(micro) > limit:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    return model(micro).mean()

try:
    guard.step(torch.ones(8, 4), loss_of)
finally:
    print(attempt, sizes, flush=True)
if attempt == 1:  # where no guard stands
    raise torch.OutOfMemoryError(OOM)
"""


@pytest.mark.reference
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_guard_and_run_take_turns_on_one_store(tmp_path):
    """Attempt 1: the guard halves, then an error outside of it; 2: the guard asks for a restart; 3: all goes well."""
    pytest.importorskip("torch")
    job, store, report = tmp_path / "job.py", tmp_path / "plan.json", tmp_path / "report.json"
    job.write_text(JOB.replace("OOM)", f"{OOM!r})"))
    done = subprocess.run(
        [sys.executable, "-m", "ullage.cli", "run", "--backoff", "0", "--interval", "60", "--plan-store", str(store),
         "--json", str(report), "--", sys.executable, str(job)], capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["1 [8, 4, 4]", "2 [2, 1]", "3 [1, 1, 1, 1, 1, 1, 1, 1]"]
    plan = PlanStore(store).load()
    assert dict(plan.knobs) == {
        "micro_batch": 2, "micro_batch@4": 1, "zero_stage": 3, "restart_plan": 1, "fresh_restarts": 0,
    }  # fmt: skip
    assert [line.split(":")[0] for line in plan.history] == ["1", "2", "3", "4"], "every change is one generation"
    kinds = [attempt["kind"] for attempt in json.loads(report.read_text())["attempts"]]
    assert kinds[1:] == ["restart", "none"] and len(kinds) == 3
