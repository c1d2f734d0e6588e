"""``ullage inspect`` on messages written here, one of each format: facts, causes, advice, and what is refused."""

from __future__ import annotations

import gzip
import io
import json
import pickle
from pathlib import Path

import jsonschema
import pytest

from ullage.cli import main
from ullage.errors import InputError
from ullage.observe.inspection import Inspection, inspect_stream
from ullage.report.inspect_json import inspect_json
from ullage.units import GiB, MiB

SCHEMA = json.loads((Path(__file__).parents[2] / "src/ullage/schema/inspect.json").read_text(encoding="utf-8"))
HINT = (
    " If reserved but unallocated memory is large try setting PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid"
    " fragmentation."
)


def inspect(text: str) -> Inspection:
    found = inspect_stream(io.BytesIO(text.encode()))
    jsonschema.validate(inspect_json(found), SCHEMA)
    return found


def modern(  # sizes as the message prints them
    asked: str, total: str, free: str, allocated: str, pieces: str, own: str = "", others: str = "", limit: str = ""
) -> str:
    own = f"Including non-PyTorch memory, this process has {own} memory in use. " if own else ""
    return (
        f"torch.OutOfMemoryError: CUDA out of memory. Tried to allocate {asked}. GPU 3 has a total capacity of {total} "
        f"of which {free} is free. {others}{own}{limit}Of the allocated memory {allocated} is allocated by PyTorch, "
        f"and {pieces} is reserved by PyTorch but unallocated.{HINT}"
    )


FULL = modern("2.00 GiB", "80.00 GiB", "1.00 GiB", "78.00 GiB", "200.00 MiB", own="79.00 GiB")
PIECES = modern("1.00 GiB", "80.00 GiB", "500.00 MiB", "60.00 GiB", "18.00 GiB", own="79.50 GiB")
OTHERS = modern(
    "1.00 GiB", "80.00 GiB", "100.00 MiB", "10.00 GiB", "50.00 MiB", own="10.60 GiB",
    others="Process 4711 has 60.00 GiB memory in use. Process 12 has 9.00 GiB memory in use. ",
)  # fmt: skip
CONTAINER = modern(
    "4.00 GiB", "80.00 GiB", "1.00 GiB", "78.00 GiB", "100.00 MiB", others="Process 990 has 79.00 GiB memory in use. "
)
CAPPED = modern(
    "8.00 GiB", "80.00 GiB", "45.00 GiB", "33.00 GiB", "1.00 GiB", own="34.50 GiB", limit="40.00 GiB allowed; "
)
OUTSIDE = modern("1.00 GiB", "80.00 GiB", "200.00 MiB", "60.00 GiB", "300.00 MiB", own="79.80 GiB")
ASYNC = (
    "Allocation on device 0 would exceed allowed memory. (out of memory)\nCurrently allocated     : 30.00 GiB\n"
    "Requested               : 12.00 GiB\nDevice limit            : 80.00 GiB\nFree (according to CUDA): 45.00 GiB\n"
    "PyTorch limit (set by user-supplied memory fraction)\n                        : 40.00 GiB"
)
OLD = (
    "RuntimeError: CUDA out of memory. Tried to allocate {} (GPU 1; 16.00 GiB total capacity; {} already allocated; "
    "{} free; {} reserved in total by PyTorch)"
)
OLDEST = (
    "RuntimeError: CUDA out of memory. Tried to allocate 500.00 MiB (GPU 0; 16.00 GiB total capacity; 12.00 GiB "
    "already allocated; 100.00 MiB free; 3.00 GiB cached)"
)
NPU = (
    "RuntimeError: NPU out of memory. Tried to allocate 40.00 GiB (NPU 5; 61.00 GiB total capacity; 30.00 GiB already "
    "allocated; 30.00 GiB current active; 29.00 GiB free; 31.00 GiB reserved in total by PyTorch)"
)
MPS = (
    "RuntimeError: MPS backend out of memory (MPS allocated: 17.00 GiB, other allocations: 500.00 MiB, max allowed: "
    "18.00 GiB). Tried to allocate 1.00 GiB on private pool. Use PYTORCH_MPS_HIGH_WATERMARK_RATIO=0.0 to disable"
)
VLLM_NEEDED = (
    "ValueError: To serve at least one request with the model's max seq len (100000), (12.00 GiB KV cache is needed, "
    "which is larger than the available KV cache memory (6.00 GiB). Based on the available memory, the estimated "
    "maximum model length is 50000. Try increasing `gpu_memory_utilization` or decreasing `max_model_len`"
)
VLLM_START = (
    "ValueError: Free memory on device cuda:0 (30.0/80.0 GiB) on startup is less than desired GPU memory utilization "
    "(0.92, 73.6 GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes."
)
SGLANG_NEEDED = (
    "ValueError: Loaded weights leave no GPU memory for the KV cache under --mem-fraction-static=0.85. Raise "
    "--mem-fraction-static above 0.912 (minimum viable = 1 - available/pre = 0.9113)."
)
XLA = (
    "jaxlib.xla_extension.XlaRuntimeError: RESOURCE_EXHAUSTED: Out of memory while trying to allocate 5368709120 bytes."
    "\nBufferAssignment stats:\n parameter allocation:    8.00GiB\n total allocation:   20.00GiB"
)
KILL = (
    "[123.4] Out of memory: Killed process 4242 (python3) total-vm:200000000kB, anon-rss:104857600kB, file-rss:0kB, "
    "shmem-rss:0kB"
)
WATCHDOG = (
    "[rank{0}]:[E ProcessGroupNCCL.cpp:616] [Rank {0}] Watchdog caught collective operation timeout: "
    "WorkNCCL(SeqNum=8, OpType=ALLREDUCE, NumelIn=1, NumelOut=1, Timeout(ms)=600000) ran for 600061 milliseconds "
    "before timing out."
)
#: (words, cause, confidence, in the first advice)
CASES = [
    (FULL, "capacity", "certain", "micro-batch"),
    (PIECES, "fragmentation", "likely", "expandable_segments:True"),
    (OTHERS, "other_process", "certain", "own GPU"),
    (CONTAINER, "capacity", "certain", "micro-batch"),
    (CAPPED, "cap", "certain", "per_process_memory_fraction:0.53"),
    (modern("4.00 GiB", "32.00 GiB", "16.00 GiB", "7.00 GiB", "7.00 GiB", own="17179869184.00 GiB",
            limit="17.5 GiB allowed; "), "fragmentation", "likely", "expandable_segments:True"),
    (modern("21.00 GiB", "8.00 GiB", "6.70 GiB", "160.00 MiB", "20.00 MiB", limit="6.80 GiB allowed; "), "capacity",
     "certain", "flash"),
    ("2026-01-02T03:04:05.678Z [36m(Actor pid=3)[0m " + FULL, "capacity", "certain", "micro-batch"),
    (OUTSIDE, "outside", "likely", "set_per_process_memory_fraction"),
    (ASYNC, "cap", "certain", "per_process_memory_fraction:0.53"),
    ("Allocation was preemptively rejected because it would exceed per_process_memory_fraction limit. " + FULL, "cap",
     "certain", "per_process_memory_fraction"),
    (OLD.format("20.00 GiB", "2.00 GiB", "12.00 GiB", "3.00 GiB"), "capacity", "certain", "flash"),
    (OLD.format("1.00 GiB", "2.00 GiB", "50.00 MiB", "2.10 GiB"), "other_process", "likely", "nvidia-smi"),
    (OLD.format("1.00 GiB", "2.00 GiB", "9.00 GiB", "2.10 GiB"), "waiting", "unsure", "retry once"),
    (OLDEST, "fragmentation", "likely", "micro-batch"),
    (OLD.format("1.00 GiB", "11.00 GiB", "50.00 MiB", "15.00 GiB") + " If reserved memory is >> allocated memory try",
     "fragmentation", "likely", "max_split_size_mb"),
    (NPU, "capacity", "certain", "flash"),
    (MPS, "cap", "likely", "micro-batch"),
    ("ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when", "kv_pool",
     "certain", "--gpu-memory-utilization 0.95"),
    ("The model's max seq len (4096) is larger than the maximum number of tokens that can be stored in KV cache (2000)",
     "kv_pool", "certain", "--max-model-len 2000"),
    (VLLM_NEEDED, "kv_pool", "certain", "--max-model-len 50000"),
    (VLLM_START, "start_budget", "certain", "--gpu-memory-utilization 0.37"),
    ("RuntimeError: Not enough memory. Please try to increase --mem-fraction-static.", "kv_pool", "certain",
     "--mem-fraction-static 0.9"),
    (SGLANG_NEEDED, "kv_pool", "certain", "--mem-fraction-static 0.93"),
    ("[2026-01-02 03:04:05 DP1 TP1] Decode out of memory. Try to lower your batch size.\nTry to allocate 64 tokens.",
     "kv_pool", "likely", "--max-running-requests"),
    ("Exception: Capture cuda graph failed: CUDA out of memory. Tried to allocate 448.00 MiB. GPU 7 has a total capac",
     "capacity", "unsure", "--mem-fraction-static 0.80"),
    (XLA, "capacity", "likely", "smaller batch"),
    ("ggml_backend_cuda_buffer_type_alloc_buffer: allocating 9000.00 MiB on device 1: cudaMalloc failed: out of memory"
     "\nggml_gallocr_reserve_n: failed to allocate CUDA1 buffer of size 9437184000", "capacity", "likely", "-fa on"),
    ("alloc_tensor_range: failed to allocate CUDA0 buffer of size 400000000000\nllama_model_load: error loading model",
     "capacity", "likely", "-ngl"),
    ("Error: model requires more system memory (12.0 GiB) than is available (7.5 GiB)", "host", "certain",
     "smaller model"),
    ("h:1:2 [3] include/alloc.h:178 NCCL WARN Cuda failure 'out of memory'\n"
     "h:1:2 [3] include/alloc.h:185 NCCL WARN Failed to CUDA calloc 4194304 bytes", "outside", "likely", "fraction"),
    ("RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", "outside", "likely",
     "room outside"),
    ("torch.AcceleratorError: CUDA error: out of memory", "outside", "unsure", ""),
    (KILL, "host", "certain", "host memory"),
    ("slurmstepd: error: Detected 1 oom_kill event in StepId=1.0. Some of the step tasks have been OOM Killed.", "host",
     "certain", "host memory"),
    ("RuntimeError: [enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to "
     "allocate 68719476736 bytes. Error code 12 (Cannot allocate memory)", "host", "certain", "host memory"),
    ("process 4 terminated with signal SIGKILL", "host", "unsure", "dmesg"),
    ("  exitcode  : -9 (pid: 77)", "host", "unsure", "dmesg"),
    (WATCHDOG.format(2), "cascade", "likely", "not among"),
    ("torch.cuda.OutOfMemoryError: CUDA out of memory.", "capacity", "unsure", "micro-batch"),
    ("RuntimeError: CUDA out of memory occurred when warming up sampler with 1024 dummy requests. Please try lowering",
     "capacity", "unsure", "--gpu-memory-utilization 0.85"),
    ("RuntimeError: CUDA out of memory encountered on a different rank", "cascade", "unsure", "not among"),
    ("vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue.", "cascade", "unsure", "not among"),
    ("ncclUnhandledCudaError: Call to CUDA function failed. unhandled cuda error (run with NCCL_DEBUG=INFO)", "outside",
     "unsure", ""),
    ("tensorflow.python.framework.errors_impl.ResourceExhaustedError: OOM when allocating tensor with shape[8,512]",
     "capacity", "unsure", "smaller batch"),
    ("XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 19.85G of 15.48G hbm.", "capacity",
     "unsure", "smaller batch"),
    ("ValueError: Some modules are dispatched on the CPU or the disk. Make sure you have enough GPU RAM to fit",
     "capacity", "unsure", "load_in_4bit"),
    ("ggml_vulkan: Device memory allocation of size 1073741824 failed.", "capacity", "likely", "-ngl"),
    ("[stage3.py:1850:step] 3 pytorch allocator cache flushes since last step. this happens when", "capacity", "unsure",
     ""),
    ("  containerStatuses: reason: OOMKilled exitCode: 137", "host", "certain", "host memory"),
    ("terminate called after throwing an instance of 'std::bad_alloc'", "host", "certain", "host memory"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "cause", "confidence", "first"), CASES)
def test_a_message_has_its_cause_and_its_first_advice(words: str, cause: str, confidence: str, first: str) -> None:
    found = inspect(words)
    assert (found.cause, found.confidence) == (cause, confidence), found.why
    assert found.why
    assert first in f"{found.advice[0].change} {found.advice[0].flags}"


def test_sizes_are_the_exact_bytes_of_what_is_printed() -> None:
    sizes = dict(inspect(PIECES).sizes)
    assert sizes["requested"] == GiB
    assert sizes["free"] == 500 * MiB
    assert sizes["unallocated"] == 18 * GiB
    assert sizes["process_used"] == 79 * GiB + GiB // 2
    assert dict(inspect(PIECES).printed)["process_used"] == "79.50 GiB"
    kernel = inspect(KILL)
    assert dict(kernel.sizes)["anonymous"] == 100 * GiB
    assert dict(inspect(XLA).sizes)["requested"] == 5368709120


def test_the_terms_add_up_to_the_card() -> None:
    for words in (FULL, PIECES, OTHERS, CONTAINER, OUTSIDE):
        found = inspect(words)
        assert abs(sum(term.bytes for term in found.terms) - found.total_bytes) <= 64 * MiB, words
        assert all(term.low_bytes <= term.bytes <= term.high_bytes for term in found.terms)


def test_what_is_taken_for_granted_is_said() -> None:
    assert any("taken to be this one" in note for note in inspect(CONTAINER).notes)
    assert not any("taken to be this one" in note for note in inspect(OTHERS).notes)


def test_the_versions_follow_from_the_words() -> None:
    assert inspect(OLDEST).versions == "1.0-1.3"
    assert inspect(OLD.format("20.00 GiB", "2.00 GiB", "12.00 GiB", "3.00 GiB")).versions == "1.4-2.0"
    assert inspect(FULL.replace("capacity", "capacty")).versions == "2.1"
    assert inspect(FULL.replace("torch.Out", "torch.cuda.Out")).versions == "2.2-2.4"
    assert inspect(FULL.replace("CUDA_ALLOC", "ALLOC")).versions == "2.9+"


def test_the_setting_that_the_message_advises_is_not_taken_for_one_that_is_set() -> None:
    assert "expandable" in inspect(PIECES).advice[0].flags
    already = inspect("PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True python train.py\n" + PIECES)
    assert already.cause == "fragmentation"
    assert all("expandable" not in piece.flags for piece in already.advice)


def test_a_message_wrapped_over_lines_and_coloured_reads_the_same() -> None:
    wrapped = PIECES.replace(". ", ".\r\n").replace(" which", "\r\nwhich")
    coloured = f"\x1b[31m{wrapped}\x1b[0m".replace("CUDA", "\x1b[1mCUDA\x1b[0m")
    assert inspect(coloured).sizes == inspect(PIECES).sizes


def test_ranks_that_write_through_each_other_are_told_apart() -> None:
    first, second = FULL.split(". "), OTHERS.split(". ")
    lines = []
    for index in range(max(len(first), len(second))):
        lines += [f"[rank3]: {first[index]}."] if index < len(first) else []
        lines += [f"(Worker_TP1 pid=77) ERROR {second[index]}."] if index < len(second) else []
    lines += [WATCHDOG.format(0), WATCHDOG.format(1)]
    found = inspect("\n".join(lines))
    assert (found.rank, found.cause) == ("3", "capacity")
    assert [(fact.rank, fact.kind) for fact in found.facts] == [
        ("3", "device_oom"),
        ("TP1", "device_oom"),
        ("0", "timeout"),
        ("1", "timeout"),
    ]
    assert dict(found.facts[1].sizes)["requested"].bytes == GiB
    assert any("2 ranks" in note for note in found.notes)


def test_the_death_that_came_first_is_the_root() -> None:
    text = "\n".join(
        [WATCHDOG.format(1), "filler"] + [""] * 30 + ["[rank5]: " + FULL, "torchrun: exitcode  : -9 (pid: 4)"]
    )
    found = inspect(text)
    assert found.rank == "5"
    assert found.cause == "capacity"
    assert any("tidying up" in note for note in found.notes)


def test_the_moment_is_read_off_the_traceback() -> None:
    frames = 'Traceback (most recent call last):\n  File "/x/torch/optim/adamw.py", line 1, in _init_group\n    a\n'
    found = inspect(frames + FULL)
    assert found.phase == "optimizer step"
    assert "optimizer" in found.advice[0].change
    zero = (
        'Traceback (most recent call last):\n  File "/x/deepspeed/runtime/zero/stage3.py", line 9, in _optimizer_step\n'
    )
    engine = inspect(zero + FULL)
    assert engine.framework == "deepspeed"
    assert "offload_optimizer" in engine.advice[0].flags


def test_known_settings_steer_the_advice() -> None:
    start = "--gpu-memory-utilization 0.8\n"
    assert "0.8" in inspect(start + VLLM_NEEDED).advice[1].change
    high = inspect("gpu_memory_utilization=0.97\n" + VLLM_NEEDED)
    assert all("--gpu-memory-utilization" not in piece.flags for piece in high.advice)
    vllm = 'File "/x/vllm/v1/worker/gpu_worker.py", line 1, in execute_model\n'
    lowered = inspect("--gpu-memory-utilization 0.90\n" + vllm + FULL)
    assert lowered.framework == "vllm"
    assert lowered.advice[0].flags == "--gpu-memory-utilization 0.87"


def test_a_cut_message_is_called_partial() -> None:
    assert inspect("CUDA out of memory. Tried to allocate 1.00 GiB. GPU 0 has a total capacity of 79.").partial
    assert not inspect(FULL).partial


@pytest.mark.parametrize("text", ["", "hello\nworld\n", "loss 1.23\n" * 1000, "\x00\xff\xfe" * 50])
def test_what_is_not_understood_says_what_was_looked_for(text: str) -> None:
    with pytest.raises(InputError, match="looked for out-of-memory messages of PyTorch"):
        inspect_stream(io.BytesIO(text.encode("latin-1")))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "run.log"
    log.write_text(PIECES, encoding="utf-8")
    assert main(["inspect", str(log)]) == 0
    text = capsys.readouterr().out
    assert text.startswith("✘ pytorch: the memory is there, in pieces")
    assert "expandable_segments:True" in text
    assert len(text.splitlines()) <= 30
    assert main(["inspect", str(log), "--json"]) == 0
    jsonschema.validate(json.loads(capsys.readouterr().out), SCHEMA)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(VLLM_START.encode())))
    assert main(["inspect", "-"]) == 0
    log.write_text("nothing here", encoding="utf-8")
    assert main(["inspect", str(log)]) == 2
    assert main(["inspect", str(tmp_path / "missing.log")]) == 2
    assert main(["inspect", str(tmp_path)]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_every_case_fits_one_screen(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for words, *_rest in CASES:
        (tmp_path / "log").write_text(words, encoding="utf-8")
        assert main(["inspect", str(tmp_path / "log")]) == 0
        assert len(capsys.readouterr().out.splitlines()) <= 30, words


def test_a_packed_log_is_unpacked_as_it_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed = gzip.compress(("filler\n" * 10_000 + PIECES).encode())
    (tmp_path / "run.log.gz").write_bytes(packed)
    assert main(["inspect", str(tmp_path / "run.log.gz")]) == 0
    assert "in pieces" in capsys.readouterr().out
    (tmp_path / "cut.gz").write_bytes(packed[: len(packed) // 2])
    assert main(["inspect", str(tmp_path / "cut.gz")]) == 0
    assert "partial answer" in capsys.readouterr().out
    (tmp_path / "cut.gz").write_bytes(packed[:40])
    assert main(["inspect", str(tmp_path / "cut.gz")]) == 2
    assert "broken" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (b"SQLite format 3\0" + b"\0" * 100, "Nsight Systems"),
        (b'{"schemaVersion": 1, "traceEvents": []}', "torch.profiler"),
        (b"PK\x03\x04" + b"\0" * 100, "archive"),
        (b"\x80\x04\x95", ""),
    ],
)
def test_formats_that_are_not_read_are_named(
    head: bytes, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_bytes(head)
    assert main(["inspect", str(tmp_path / "file")]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error


def snapshot_with(size: int, pieces: int, refused: int | None) -> bytes:
    """Return a snapshot of one segment with one block of ``size`` bytes and ``pieces`` free bytes."""
    frames = [{"name": "step", "filename": "/job/train.py", "line": 7}]
    block = {"address": 4096, "size": size, "requested_size": size, "state": "active_allocated", "frames": frames}
    free = {"address": 4096 + size, "size": pieces, "requested_size": 0, "state": "inactive", "frames": []}
    segment = {
        "device": 0, "address": 4096, "total_size": size + pieces, "allocated_size": size, "active_size": size,
        "stream": 0, "segment_type": "large", "frames": frames, "blocks": [block, free],
    }  # fmt: skip
    trace = [{"action": "oom", "size": refused, "stream": 0, "device_free": 0, "frames": []}] if refused else []
    return pickle.dumps({"segments": [segment], "device_traces": [trace]})


@pytest.mark.parametrize(
    ("refused", "cause", "partial"),
    [(50 * MiB, "fragmentation", False), (900 * MiB, "capacity", False), (None, "none", True)],
)
def test_a_snapshot_says_what_holds_the_memory(
    refused: int | None, cause: str, partial: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "snapshot.pickle"
    path.write_bytes(snapshot_with(400 * MiB, 200 * MiB, refused))
    assert main(["inspect", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    jsonschema.validate(found, SCHEMA)
    assert (found["kind"], found["cause"], found["partial"]) == ("snapshot", cause, partial)
    assert found["sizes"]["pinned"] == 200 * MiB
    assert sum(term["bytes"] for term in found["terms"]) == found["sizes"]["reserved"] == 600 * MiB
    assert any("step (/job/train.py:7)" in note for note in found["notes"])
    assert main(["inspect", str(path)]) == 0
    assert "reserved" in capsys.readouterr().out
