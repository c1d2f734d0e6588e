"""Deaths told apart, by the exit code, the log, the kernel's counters and what torchrun lists."""

import json

import pytest

from ullage.guard.run.child import Ended
from ullage.guard.run.deaths import judge, worker_exit_code
from ullage.guard.run.host_kills import KillWatch, count_kills, own_cgroups
from ullage.guard.run.tail import MAX_LINE_BYTES, Tail

OOM = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.15 GiB "
    "of which 1.00 GiB is free. Including non-PyTorch memory, this process has 78.15 GiB memory in use. Of the "
    "allocated memory 77.00 GiB is allocated by PyTorch, and 100.00 MiB is reserved by PyTorch but unallocated."
)
TORCHRUN = """\
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
Root Cause (first observed failure):
[0]:
  rank      : 1 (local_rank: 1)
  exitcode  : {code} (pid: 4711)
"""


def ended(text="", *, exit_code=1, **more):
    tail = Tail()
    tail.take(1, text.encode())
    tail.finish()
    return Ended(exit_code=exit_code, tail=tail, **more)


def traceback(error):
    return f'Traceback (most recent call last):\n  File "train.py", line 3, in main\n{error}\n'


CASES = {
    "none": ended("", exit_code=0),
    "restart": ended(TORCHRUN.format(code=75)),
    "cannot_fit": ended("CANNOT FIT: the smallest plan ran out of memory\n" + TORCHRUN.format(code=3)),
    "device_oom": ended(traceback(OOM) + TORCHRUN.format(code=1)),
    "library_oom": ended(traceback("RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate")),
    "kv_pool": ended("ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`"),
    "start_budget": ended(
        "ValueError: Free memory on device cuda:0 (30.0/79.1 GiB) on startup is less than desired GPU memory "
        "utilization (0.9, 71.2 GiB). Decrease GPU memory utilization"
    ),
    "host_oom": ended(traceback("MemoryError")),
    "killed": ended(TORCHRUN.format(code=-9)),
    "cascade": ended(traceback("RuntimeError: [gloo/transport/tcp/pair.cc:5] Connection closed by peer [127.0.0.1]")),
    "stall": ended("step 3\n", exit_code=143, by="stall"),
    "signal": ended("", exit_code=130, by="signal", asked_to_end=2),
    "disk_full": ended(traceback("OSError: [Errno 28] No space left on device")),
    "crash": ended(traceback("ValueError: no such layer")),
    "not_started": ended("", exit_code=127, errno=2),
}  # fmt: skip


@pytest.mark.parametrize("kind", CASES)
def test_kinds(kind):
    death = judge(CASES[kind])
    assert death.kind == kind, death.sentence
    assert death.sentence


def test_every_kind_is_in_the_schema():
    from pathlib import Path

    schema = json.loads((Path(__file__).parents[2] / "src/ullage/schema/run.json").read_text())
    known = schema["properties"]["attempts"]["items"]["properties"]["kind"]["enum"]
    assert set(CASES) | {"host_killed"} == set(known)


def test_a_message_that_the_guard_recovered_from_is_not_the_death():
    text = traceback(OOM) + "plan 1: out of memory on rank 0 in forward: micro-batch 8 to 4\nstep 9\n"
    assert judge(ended(text + traceback("ValueError: no such layer"))).kind == "crash"
    assert judge(ended(text + traceback(OOM))).kind == "device_oom"


def test_the_rank_that_failed_is_named_and_not_those_that_lost_it():
    lost = "".join(f"[rank{rank}]: RuntimeError: Connection closed by peer [127.0.0.1]\n" for rank in range(1, 8))
    death = judge(ended(lost + "[rank0]: ValueError: no such layer\n" + lost + TORCHRUN.format(code=1)))
    assert death.kind == "crash"
    assert "ValueError: no such layer" in death.sentence
    assert judge(ended(lost + TORCHRUN.format(code=1))).kind == "cascade"


def test_a_message_long_before_the_end_is_not_the_death_and_settings_of_the_start_count():
    start = traceback(OOM) + "vllm serve m --gpu-memory-utilization 0.87\n"
    steps = "".join(f"step {number}: loss 1.0, and everything is well\n" for number in range(40_000))
    assert judge(ended(start + steps + traceback("ValueError: no such layer"))).kind == "crash"
    death = judge(ended(start + steps + traceback(OOM)))
    assert death.kind == "device_oom"
    assert dict(death.found.settings)["gpu_memory_utilization"] == "0.87"


def test_the_kernels_kills_count_where_they_are_ours():
    killed = ended("step 3\n", exit_code=137, signal=9, pid=50)
    assert judge(killed).kind == "killed"
    assert judge(killed, killed_pids=(51,)).kind == "killed"
    assert judge(killed, killed_pids=(50,)).kind == "host_killed"
    assert judge(killed, num_kills=1).kind == "host_killed"
    worker = ended(TORCHRUN.format(code=-9), pid=50)
    assert judge(worker, killed_pids=(4711,)).kind == "host_killed"
    assert judge(ended("", exit_code=0, pid=50), num_kills=1).kind == "none"


def test_a_success_with_an_oom_in_its_log_is_a_success():
    assert judge(ended(OOM, exit_code=0)).kind == "none"


def test_the_root_cause_of_torchrun():
    first = "failed (exitcode: 1) local_rank: 0 (pid: 3)\n"
    assert worker_exit_code((first + TORCHRUN.format(code=-9)).encode()) == -9
    assert worker_exit_code(first.encode()) == 1
    assert worker_exit_code(b"") is None


def test_signatures_tell_equal_failures_apart_from_others():
    one, two = (
        judge(ended(traceback("ValueError: step 31 of 0x7f"))),
        judge(ended(traceback("ValueError: step 32 of 0x8f"))),
    )
    assert one.signature == two.signature
    assert one.signature != judge(ended(traceback("KeyError: step 31"))).signature


def test_a_tail_is_bounded_and_keeps_both_ends():
    tail = Tail(head_bytes=1000, tail_bytes=2000)
    for number in range(10_000):
        tail.take(1, f"line {number}\n".encode())
    tail.take(1, b"half")
    tail.take(2, b"other\r\n")
    tail.finish()
    text = tail.text()
    assert len(text) <= 3100
    assert text.startswith(b"line 0\n")
    assert text.endswith(b"line 9999\nother\nhalf\n")
    tail.take(1, b"x" * 100_000)
    assert max(map(len, tail.text().splitlines())) <= MAX_LINE_BYTES


def test_counts_of_cgroups(tmp_path):
    for folder, count in (("job", 2), ("", 40)):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "memory.events").write_text(f"low 0\noom 3\noom_kill {count}\n")
    files = own_cgroups("0::/job\n", tmp_path)
    assert [file.parent.name for file in files] == ["job", tmp_path.name]
    assert count_kills(files) == 2
    assert count_kills([]) == 0
    old = tmp_path / "memory" / "job"
    old.mkdir(parents=True)
    (old / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 5\n")
    assert count_kills(own_cgroups("4:memory:/job\n3:cpu:/\n", tmp_path)) == 5


def test_nothing_is_killed_meanwhile():
    watch = KillWatch()
    assert watch.new_kills()[0] == 0
    watch.close()
