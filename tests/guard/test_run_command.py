"""``ullage run`` as people start it: real processes, real signals, and nothing that outlives a run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest

from ullage.cli import main
from ullage.guard.plan import Plan
from ullage.guard.store import PlanStore
from ullage.units import format_bytes

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
SCHEMA = json.loads((Path(__file__).parents[2] / "src/ullage/schema/run.json").read_text())
RUN = [sys.executable, "-m", "ullage.cli", "run"]
QUICK = ["--backoff", "0", "--grace", "5", "--interval", "60"]
OOM = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.15 GiB "
    "of which 1.00 GiB is free. Of the allocated memory 77.00 GiB is allocated by PyTorch"
)


def marked(mark):
    """Return the live processes whose environment holds a mark: what a command started, wherever it went."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state = (entry / "stat").read_bytes().rpartition(b")")[2].split()[0]
                if state not in (b"Z", b"X") and mark.encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                pass
    return found


def listening():
    """Tests may themselves run where hang-ups and interrupts are ignored, as under nohup; commands inherit that."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


class Run:
    """A run in the background, with a mark in the environment of all that it starts."""

    def __init__(self, *words, stdin=None, **environment):
        self.mark = f"ULLAGE_TEST_MARK={os.getpid()}-{time.monotonic_ns()}"
        name, _, value = self.mark.partition("=")
        self.process = subprocess.Popen(
            [*RUN, *QUICK, *words], stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, name: value, **environment}, preexec_fn=listening,
        )  # fmt: skip

    def finish(self, timeout=60):
        self.out, self.err = self.process.communicate(timeout=timeout)
        return self.process.returncode

    def nothing_left(self, seconds=15.0):
        end = time.monotonic() + seconds
        while (left := marked(self.mark)) and time.monotonic() < end:
            time.sleep(0.05)
        return left == []


def run(*words, **environment):
    started = Run(*words, **environment)
    started.finish()
    assert started.nothing_left()
    return started


def script(tmp_path, text):
    path = tmp_path / "job.py"
    path.write_text("import os, sys, time, json, signal, subprocess\n" + text)
    return [sys.executable, str(path)]


def reported(tmp_path, *words):
    path = tmp_path / "report.json"
    done = run("--json", str(path), *words)
    found = json.loads(path.read_text())
    jsonschema.validate(found, SCHEMA)
    assert found["exit_code"] == done.process.returncode
    return found, done


def test_output_is_passed_on_unchanged():
    data = bytes(range(256)) * 5000 + b"no line end"
    words = [
        *RUN,
        *QUICK,
        "--",
        sys.executable,
        "-c",
        "import sys; sys.stdout.buffer.write(sys.stdin.buffer.read()); sys.stderr.write('e')",
    ]
    done = subprocess.run(words, input=data, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, data, b"e")


def test_a_reader_that_goes_away_ends_the_command_as_without_us():
    words = " ".join(map(repr, [*RUN, *QUICK, "--", "yes"]))
    done = subprocess.run(
        ["bash", "-c", f"{words} 2>/dev/null | head -3; exit ${{PIPESTATUS[0]}}"], capture_output=True, timeout=30
    )
    assert done.stdout == b"y\n" * 3
    assert done.returncode in (141, 1)


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["no-such-command-x"], 127, "no-such-command-x: No such file or directory"),
        (["/etc/passwd"], 126, "Permission denied"),
        ([], 2, "no command is given"),
    ],
)
def test_what_cannot_be_started_is_said_in_one_sentence(words, code, says):
    done = run("--", *words)
    assert done.process.returncode == code
    assert says in done.err
    assert done.err.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [["--max-restarts", "x"], ["--max-restarts", "-1"], ["--restart-on", "weather"], ["--stall-timeout", "soon"],
     ["--stall-signal", "NOPE"], ["--reserve", "many"], ["--plan", "x"], ["--on", "8xFOO9000"], ["--interval", "0"],
     ["--json", "/nowhere/at/all.json"], ["--record", "/proc/x/y"]],
)  # fmt: skip
def test_nonsense_is_refused_before_anything_starts(words, tmp_path):
    trace = tmp_path / "started"
    done = run(*words, "--", "touch", str(trace))
    assert done.process.returncode == 2, done.err
    assert done.err.count("\n") == 1
    assert not trace.exists()


def test_the_exit_code_is_the_commands_own():
    assert run("--", "sh", "-c", "exit 42").process.returncode == 42
    assert run("--max-restarts", "0", "--", "sh", "-c", "kill -11 $$").process.returncode == 139


def test_an_ordinary_error_is_not_restarted(tmp_path):
    found, _done = reported(tmp_path, "--", *script(tmp_path, "raise ValueError('no such layer')"))
    assert (found["verdict"], len(found["attempts"])) == ("stopped", 1)
    assert "ValueError: no such layer" in found["sentence"]


def test_the_same_error_is_not_tried_a_third_time(tmp_path):
    words = script(tmp_path, "raise ValueError(f'step {time.time()}')")
    found, _done = reported(tmp_path, "--restart-on", "crash", "--", *words)
    assert len(found["attempts"]) == 2
    assert "the same error twice" in found["sentence"]


def test_a_killed_command_is_started_again(tmp_path):
    words = script(tmp_path, "if os.environ['ULLAGE_ATTEMPT'] < '3': os.kill(os.getpid(), 9)\nprint('fine')")
    found, done = reported(tmp_path, "--", *words)
    assert found["exit_code"] == 0
    assert [attempt["kind"] for attempt in found["attempts"]] == ["killed", "killed", "none"]
    assert done.out == "fine\n"


def test_restarts_are_bounded(tmp_path):
    found, _done = reported(tmp_path, "--max-restarts", "3", "--", "sh", "-c", "kill -9 $$")
    assert (found["exit_code"], len(found["attempts"])) == (137, 4)
    assert "3 restarts" in found["sentence"]


TRAIN = f"""
values = dict((name, int(value)) for name, value in zip(sys.argv[1::2], sys.argv[2::2]) if value.isdigit())
assert values['--per_device_train_batch_size'] * values['--gradient_accumulation_steps'] == 16
print(values)
if values['--per_device_train_batch_size'] > LIMIT:
    raise RuntimeError({OOM!r})
"""
BATCH = ["--per_device_train_batch_size", "16", "--gradient_accumulation_steps", "1"]


def test_an_oom_shrinks_to_success_with_the_global_batch_unchanged(tmp_path):
    found, done = reported(tmp_path, "--", *script(tmp_path, TRAIN.replace("LIMIT", "2")), *BATCH)
    assert found["verdict"] == "succeeded"
    assert [attempt["kind"] for attempt in found["attempts"]] == ["device_oom"] * 3 + ["none"]
    assert [attempt["plan"]["knobs"].get("micro_batch") for attempt in found["attempts"]] == [None, 8, 4, 2]
    assert "micro-batch 16 becomes 8, accumulation 1 becomes 2: the global batch stays" in done.err


def test_an_oom_that_nothing_mends_says_that_it_cannot_fit_and_never_repeats(tmp_path):
    found, done = reported(tmp_path, "--", *script(tmp_path, TRAIN.replace("LIMIT", "0")), *BATCH)
    assert (found["verdict"], found["exit_code"]) == ("cannot_fit", 3)
    commands = [tuple(attempt["command"]) for attempt in found["attempts"]]
    assert len(set(commands)) == len(commands) == 6  # 16, 8, 4, 2, 1, and 1 with recompute
    assert "cannot fit" in done.err


def test_an_oom_without_anything_to_shrink_is_not_retried(tmp_path):
    found, _done = reported(tmp_path, "--", *script(tmp_path, f"raise RuntimeError({OOM!r})"))
    assert (found["exit_code"], len(found["attempts"])) == (3, 1)
    assert "nothing that can be shrunk is known" in found["sentence"]
    assert found["need"]["why_not"]


def test_a_shrunk_plan_outlives_the_run(tmp_path):
    store = tmp_path / "plan.json"
    words = [*script(tmp_path, TRAIN.replace("LIMIT", "4")), *BATCH]
    reported(tmp_path, "--plan-store", str(store), "--", *words)
    found, done = reported(tmp_path, "--plan-store", str(store), "--", *words)
    assert len(found["attempts"]) == 1
    assert "goes on with the plan" in done.err


GUARDED = """
from ullage.guard import Plan, PlanStore
store = PlanStore.from_environment()
plan = store.load() or Plan(knobs={'micro_batch': 8})
if plan.get('micro_batch') > 2:
    store.save(plan.shrunk('half', micro_batch=plan.get('micro_batch') // 2))
    sys.exit(75)
print('micro-batch', plan.get('micro_batch'))
"""


def test_a_job_that_asks_is_started_with_its_smaller_plan(tmp_path):
    found, done = reported(tmp_path, "--", *script(tmp_path, GUARDED))
    assert found["verdict"] == "succeeded"
    assert [attempt["kind"] for attempt in found["attempts"]] == ["restart", "restart", "none"]
    assert done.out == "micro-batch 2\n"


def test_a_job_that_asks_again_with_the_same_plan_is_stopped(tmp_path):
    found, _done = reported(tmp_path, "--", "sh", "-c", "exit 75")
    assert (found["exit_code"], len(found["attempts"])) == (75, 2)


def test_a_corrupt_plan_is_refused_and_kept_aside(tmp_path):
    store = tmp_path / "plan.json"
    store.write_text("{nonsense")
    done = run("--plan-store", str(store), "--", "touch", str(tmp_path / "started"))
    assert done.process.returncode == 2
    assert "plan.json.corrupt-1" in done.err
    assert (tmp_path / "plan.json.corrupt-1").read_text() == "{nonsense"
    assert not (tmp_path / "started").exists()


def test_a_plan_that_becomes_corrupt_is_written_anew(tmp_path):
    store = tmp_path / "plan.json"
    PlanStore(store).save(Plan(generation=1, knobs=(("micro_batch", 4),)))
    spoil = f"""
from ullage.guard import PlanStore
if os.environ['ULLAGE_ATTEMPT'] == '1':
    open({str(store)!r}, 'w').write('half a pl')
    os.kill(os.getpid(), 9)
print(PlanStore.from_environment().load().get('micro_batch'))
"""
    found, done = reported(tmp_path, "--plan-store", str(store), "--", *script(tmp_path, spoil))
    assert (found["exit_code"], done.out) == (0, "4\n")
    assert any("written anew" in warning for warning in found["warnings"])


LEAVES = """
subprocess.Popen(['sleep', '300'], start_new_session=True)
subprocess.Popen(['sh', '-c', 'trap "" TERM; sleep 301 & wait; sleep 302'], start_new_session=True)
os.fork() or os.setsid() or os.fork() or time.sleep(300)
"""


@pytest.mark.parametrize("ending", ["", "os.kill(os.getpid(), 9)", "sys.exit(3)"])
def test_what_a_command_leaves_behind_is_ended(tmp_path, ending):
    found, _done = reported(tmp_path, "--max-restarts", "0", "--", *script(tmp_path, LEAVES + ending))
    assert found["attempts"][0]["num_swept"] >= 3
    assert found["attempts"][0]["num_left"] == 0


def wait_for(predicate, seconds=20.0):
    end = time.monotonic() + seconds
    while not predicate():
        assert time.monotonic() < end
        time.sleep(0.02)


WAITS = "print('ready', flush=True)\n" + LEAVES + "time.sleep(300)"


@pytest.mark.parametrize("victim", ["run", "keeper", "command", "both"])
def test_nothing_survives_when_any_of_the_three_is_killed(tmp_path, victim):
    started = Run("--max-restarts", "0", "--", *script(tmp_path, WAITS))
    assert started.process.stdout.readline() == "ready\n"
    wait_for(lambda: len(marked(started.mark)) >= 7)
    keeper = next(pid for pid in marked(started.mark) if b"keeper.py" in Path(f"/proc/{pid}/cmdline").read_bytes())
    command = next(
        pid
        for pid in marked(started.mark)
        if f" {keeper} " in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2][:12]
    )
    victims = {
        "run": [started.process.pid],
        "keeper": [keeper],
        "command": [command],
        "both": [command, started.process.pid],
    }
    for pid in victims[victim]:
        os.kill(pid, signal.SIGKILL)
    assert started.nothing_left(30)
    started.finish()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_request_to_end_reaches_the_command(tmp_path, number):
    job = f"""
def end(number, frame):
    print('saved', flush=True)
    sys.exit(7)
signal.signal({int(number)}, end)
print('ready', flush=True)
time.sleep(300)
"""
    started = Run("--", *script(tmp_path, job))
    assert started.process.stdout.readline() == "ready\n"
    started.process.send_signal(number)
    assert started.finish() == 7
    assert started.out == "saved\n"
    assert "restart" not in started.err
    assert started.nothing_left()


def test_a_command_that_does_not_end_is_killed_after_the_grace(tmp_path):
    job = "signal.signal(15, signal.SIG_IGN)\nprint('ready', flush=True)\ntime.sleep(300)"
    started = Run("--grace", "0.5", "--", *script(tmp_path, job))
    assert started.process.stdout.readline() == "ready\n"
    start = time.monotonic()
    started.process.terminate()
    assert started.finish() == 137
    assert 0.4 < time.monotonic() - start < 10
    assert started.nothing_left()


def test_other_signals_are_handed_on(tmp_path):
    job = """
signal.signal(signal.SIGUSR1, lambda *_: print('usr1', flush=True))
signal.signal(signal.SIGWINCH, lambda *_: sys.exit(5))
print('ready', flush=True)
while True: time.sleep(0.1)
"""
    started = Run("--", *script(tmp_path, job))
    assert started.process.stdout.readline() == "ready\n"
    started.process.send_signal(signal.SIGUSR1)
    assert started.process.stdout.readline() == "usr1\n"
    started.process.send_signal(signal.SIGWINCH)
    assert started.finish() == 5


def test_an_interrupt_between_two_attempts_stops(tmp_path):
    started = Run("--backoff", "60", "--", "sh", "-c", "kill -9 $$")
    while "starts again" not in started.process.stderr.readline():
        pass
    started.process.send_signal(signal.SIGINT)
    assert started.finish() == 130


def test_a_silent_job_is_dumped_and_started_again(tmp_path):
    job = """
import faulthandler
faulthandler.register(signal.SIGUSR1)
print('ready', flush=True)
if os.environ['ULLAGE_ATTEMPT'] == '1': time.sleep(300)
"""
    words = ["--stall-timeout", "1", "--stall-signal", "USR1", "--", *script(tmp_path, job)]
    found, done = reported(tmp_path, *words)
    assert [attempt["kind"] for attempt in found["attempts"]] == ["stall", "none"]
    assert 'job.py", line 6' in done.err  # faulthandler's own words
    assert str(Path(sys.executable).name) in found["attempts"][0]["dump"]


def test_a_heartbeat_is_a_sign_of_life(tmp_path):
    job = """
for _ in range(20):
    open(os.path.join(os.environ['ULLAGE_HEARTBEAT'], 'rank0'), 'w').close()
    time.sleep(0.1)
"""
    found, _done = reported(tmp_path, "--stall-timeout", "1", "--", *script(tmp_path, job))
    assert [attempt["kind"] for attempt in found["attempts"]] == ["none"]


SERVE = f"""
share = float(sys.argv[sys.argv.index('--gpu-memory-utilization') + 1])
if share > 0.85:
    raise RuntimeError({OOM!r})
if '--max-model-len' not in sys.argv:
    raise ValueError("To serve at least one request with the models's max seq len (131072), (16.00 GiB KV cache is needed, which is larger than the available KV cache memory (7.52 GiB). Based on the available memory, the estimated maximum model length is 61520.")
print(sys.argv[1:])
"""  # noqa: E501


def test_an_engine_is_started_with_what_it_says_itself(tmp_path):
    path = tmp_path / "vllm"
    path.write_text(f"#!{sys.executable}\nimport sys\n" + SERVE)
    path.chmod(0o755)
    found, done = reported(tmp_path, "--", str(path), "serve", "m", "--gpu-memory-utilization", "0.88")
    assert found["verdict"] == "succeeded", done.err
    assert "'--max-model-len', '61520'" in done.out


LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672,
    "num_attention_heads": 64, "num_hidden_layers": 80, "num_key_value_heads": 8, "vocab_size": 128256,
    "torch_dtype": "bfloat16", "max_position_embeddings": 8192, "tie_word_embeddings": False, "rms_norm_eps": 1e-5,
}  # fmt: skip


def test_what_cannot_fit_is_what_the_ledger_says(tmp_path, capsys):
    """Weights that are larger than the card: the figure is the one of ``ullage fit``."""
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(json.dumps(LLAMA_70B))
    path = tmp_path / "vllm"
    path.write_text(f"#!{sys.executable}\ndef load_model():\n    raise RuntimeError({OOM!r})\nload_model()\n")
    path.chmod(0o755)
    model = str(tmp_path / "m")
    found, _done = reported(tmp_path, "--on", "1xH100", "--", str(path), "serve", model)
    assert (found["verdict"], len(found["attempts"])) == ("cannot_fit", 1)
    assert main(["fit", "--from", f"vllm:vllm serve {model}", "--on", "1xH100", "--json"]) == 3
    fit = json.loads(capsys.readouterr().out)
    assert found["need"]["verdict"] == fit["verdict"] == "does_not_fit"
    assert found["need"]["total_bytes"] == fit["device"]["total_bytes"]
    assert found["need"]["need_bytes"] > found["need"]["total_bytes"]
    assert found["need"]["advice"][0]["flags"] == fit["advice"][0]["flags"]


def test_the_reserve_is_told_and_recorded(tmp_path):
    record = tmp_path / "run.jsonl"
    words = ["--reserve", "99.9%", "--interval", "0.1", "--record", str(record), "--", "sleep", "0.5"]
    found, _done = reported(tmp_path, *words)
    assert any("reserve" in warning for warning in found["warnings"])
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    assert {"start", "reserve", "end"} <= {line.get("event") for line in lines}
    assert found["attempts"][0]["peaks"][0]["used_bytes"] > 0


def test_a_launcher_that_retries_the_same_is_named(tmp_path):
    path = tmp_path / "torchrun"
    path.write_text("#!/bin/sh\nexit 0\n")
    path.chmod(0o755)
    assert "retries the same arguments 3 times" in run("--", str(path), "--max-restarts=3", "x.py").err


def test_a_training_job_that_cannot_fit_is_what_the_ledger_says_of_its_last_plan(tmp_path, capsys):
    job = {
        "kind": "train", "model": "llama-3.1-70b", "gpu": "H100-80GB", "num_gpus": 8, "engine": "fsdp2",
        "seq_len": 8192, "parallel": {"fsdp": "full_shard"},
    }  # fmt: skip
    path = tmp_path / "job.json"
    path.write_text(json.dumps({"job": {**job, "micro_batch_size": 16}}))
    words = [*script(tmp_path, TRAIN.replace("LIMIT", "0")), *BATCH]
    found, _done = reported(tmp_path, "--max-restarts", "9", "--job", str(path), "--", *words)
    assert found["verdict"] == "cannot_fit"
    assert found["attempts"][-1]["plan"]["knobs"] == {"micro_batch": 1, "grad_accum": 16, "recompute": "full"}
    last = {**job, "micro_batch_size": 1, "grad_accum": 16, "recompute": {"kind": "full"}}
    path.write_text(json.dumps({"job": last}))
    main(["fit", str(path), "--json", "--no-advice"])
    fit = json.loads(capsys.readouterr().out)
    need = found["need"]
    assert (need["verdict"], need["need_bytes"]) == (fit["verdict"], fit["worst"]["device_used_bytes"])
    assert need["total_bytes"] == fit["device"]["total_bytes"]
    assert format_bytes(need["need_bytes"]) in found["sentence"]
