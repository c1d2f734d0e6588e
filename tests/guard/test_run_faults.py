"""Random faults under ``ullage run`` with torchrun: every run ends with the right result, or with a clear stop.

A handful here; ``ULLAGE_FAULTS=200`` runs that many faults. Real faults: limits of memory (RLIMIT_AS), of file sizes
(RLIMIT_FSIZE), SIGKILL at random moments, a plan overwritten with half a plan, a rank that sleeps.
"""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytestmark = pytest.mark.reference

from run_faults import BATCH, EVERY, KINDS, NUM_RANKS, NUM_SAMPLES, NUM_STEPS, STOPS, samples  # noqa: E402

HERE = Path(__file__).parent
PER_RUN = 5
NUM_FAULTS = int(os.environ.get("ULLAGE_FAULTS", "8"))
STALL = os.environ.get("ULLAGE_FAULTS_STALL", "20")
#: Faults that cost an attempt each are at most so many in a run, so that none meets the bound of restarts.
MAX_RESTARTS = 12


def planned():
    """Return the faults of each run; the first ones cover every kind."""
    rng = random.Random(7)
    kinds = [*KINDS, *STOPS]
    rng.shuffle(kinds)
    while len(kinds) < NUM_FAULTS:
        kinds.append(rng.choice([*KINDS * 6, *STOPS]))
    runs, waiting = [], kinds[:NUM_FAULTS]
    while waiting:
        run = []
        while waiting and len(run) < PER_RUN:
            run.append(waiting.pop(0))
            if run[-1] in STOPS:
                break
        steps = sorted(rng.sample(range(1, NUM_STEPS), len(run)))
        runs.append(
            [
                {"kind": kind, "step": step - step % EVERY if kind == "disk_full" else step,
                 "rank": rng.randrange(NUM_RANKS), "delay": rng.random() * 0.2}
                for kind, step in zip(run, steps, strict=True)
            ]
        )  # fmt: skip
    return runs


def command(folder, *options):
    run = [sys.executable, "-m", "ullage.cli", "run", "--backoff", "0.1", "--grace", "5", "--interval", "60"]
    run += ["--max-restarts", str(MAX_RESTARTS), "--plan-store", str(folder / "plan.json"), "--stall-timeout", STALL]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={NUM_RANKS}"]
    return [*run, *options, "--", *launcher, str(HERE / "run_faults.py"), str(folder)]


def started(folder, *options):
    mark = f"{os.getpid()}-{time.monotonic_ns()}"
    report = folder / "report.json"
    with (folder / "log.txt").open("ab") as log:
        code = subprocess.run(
            command(folder, "--json", str(report), *options), stdout=log, stderr=log, timeout=900,
            env={**os.environ, "ULLAGE_TEST_MARK": mark, "OMP_NUM_THREADS": "1"},
        ).returncode  # fmt: skip
    assert left_over(mark) == []
    found = json.loads(report.read_text())
    assert found["exit_code"] == code
    assert all(attempt["num_left"] == 0 for attempt in found["attempts"])
    return found


def left_over(mark, seconds=5.0):
    """Return the processes that a run has left: there is nothing to wait for but the system's own tidying."""
    end = time.monotonic() + seconds
    while True:
        found = [entry.name for entry in Path("/proc").iterdir() if entry.name.isdigit() and holds(entry, mark)]
        if not found or time.monotonic() > end:
            return found
        time.sleep(0.05)


def holds(entry, mark):
    try:
        state = (entry / "stat").read_bytes().rpartition(b")")[2].split()[0]
        return state not in (b"Z", b"X") and f"ULLAGE_TEST_MARK={mark}".encode() in (entry / "environ").read_bytes()
    except OSError:
        return False


def check_result(folder):
    """Every sample was used exactly once, in its order, by the weights and by the ledger of each rank."""
    for rank in range(NUM_RANKS):
        result = json.loads((folder / f"result-{rank}.json").read_text())
        assert result["uses"] == [1.0] * NUM_SAMPLES
        assert result["ledger"] == [number for step in range(NUM_STEPS) for number in samples(step, rank)]


def test_the_check_can_fail():
    used = [number for step in range(NUM_STEPS) for rank in range(NUM_RANKS) for number in samples(step, rank)]
    assert sorted(used) == list(range(NUM_SAMPLES))
    assert len(used) == NUM_STEPS * NUM_RANKS * BATCH


@pytest.mark.parametrize("number", range(len(planned())))
def test_faults(number, tmp_path):
    faults = planned()[number]
    (tmp_path / "faults.json").write_text(json.dumps(faults))
    (tmp_path / "job.json").write_text(json.dumps({"rewind": number % 2 == 0}))
    found = started(tmp_path, "--plan", f"micro_batch={BATCH}")
    said = f"{faults}\n{[(each['kind'], each['sentence']) for each in found['attempts']]}\n{found['sentence']}"
    stops = {STOPS[fault["kind"]] for fault in faults if fault["kind"] in STOPS}
    if found["verdict"] == "succeeded":
        assert not stops, said
        check_result(tmp_path)
    else:
        assert found["exit_code"] in (stops or {3}), said
        assert found["verdict"] == ("stopped" if found["exit_code"] == 1 else "cannot_fit"), said
        assert found["sentence"]
        (tmp_path / "faults.json").write_text("[]")  # what it left behind is whole: without faults it goes on
        (tmp_path / "plan.json").unlink(missing_ok=True)
        assert started(tmp_path)["verdict"] == "succeeded"
        check_result(tmp_path)
    if record := os.environ.get("ULLAGE_FAULTS_RECORD"):
        with Path(record).open("a") as file:
            fired = sum(1 for at in range(len(faults)) if any(tmp_path.glob(f"fired-{at}-*")))
            kinds = [fault["kind"] for fault in faults]
            values = {"run": number, "faults": kinds, "fired": fired, "verdict": found["verdict"]}
            file.write(json.dumps(values | {"attempts": [each["kind"] for each in found["attempts"]]}) + "\n")
