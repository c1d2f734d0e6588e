"""Smaller plans: which flags change, by how much, and in which direction."""

import shlex

import pytest

from ullage.errors import InputError
from ullage.guard.plan import Plan
from ullage.guard.run.programs import engine_of, launcher_retries, trainer_of
from ullage.guard.run.shrink import Setting, parse_knobs, smaller, why_not, with_plan
from ullage.guard.run.training import smaller_micro_batch
from ullage.guard.run.words import Words

from test_run_deaths import OOM, ended, judge, traceback  # isort: skip

CAPTURE = (
    'Traceback (most recent call last):\n  File "/x/vllm/v1/worker/gpu_model_runner.py", line 3, in capture_model\n'
)
LOAD = 'Traceback (most recent call last):\n  File "/x/vllm/v1/worker/gpu_worker.py", line 3, in load_model\n'
PROFILE = 'Traceback (most recent call last):\n  File "/x/vllm/v1/worker/gpu_worker.py", line 3, in profile_run\n'
NO_BLOCKS = "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when initializing the engine."  # noqa: E501
TOO_LONG = (
    "ValueError: To serve at least one request with the models's max seq len (131072), (16.00 GiB KV cache is needed, "
    "which is larger than the available KV cache memory (7.52 GiB). Based on the available memory, the estimated "
    "maximum model length is 61520. Try increasing `gpu_memory_utilization` or decreasing `max_model_len`"
)


def setting(line, **knobs):
    return Setting(plan=Plan(knobs=tuple(knobs.items())), words=tuple(shlex.split(line)))


def after(line, text, **knobs):
    start = setting(line, **knobs)
    death = judge(ended(text))
    change = smaller(start, death, start.words)
    return None if change is None else shlex.join(change.setting.words)


TRAINERS = (
    (
        "torchrun train.py --per_device_train_batch_size 8 --gradient_accumulation_steps=2",
        "torchrun train.py --per_device_train_batch_size 4 --gradient_accumulation_steps=4",
    ),
    (
        "accelerate launch sft.py --per-device-train-batch-size=6",
        "accelerate launch sft.py --per-device-train-batch-size=3 --gradient_accumulation_steps 2",
    ),
    (
        "torchrun sft.py --gradient_accumulation_steps 3 --per_device_train_batch_size 1",
        "torchrun sft.py --gradient_accumulation_steps 3 --per_device_train_batch_size 1 --gradient_checkpointing True",
    ),
    ("torchrun sft.py --per_device_train_batch_size 1 --gradient_checkpointing true", None),
    (
        "torchrun pretrain_gpt.py --micro-batch-size 4 --global-batch-size 256 --seq-length 4096",
        "torchrun pretrain_gpt.py --micro-batch-size 2 --global-batch-size 256 --seq-length 4096",
    ),
    (
        "torchrun pretrain_gpt.py --micro-batch-size 1 --global-batch-size 256",
        "torchrun pretrain_gpt.py --micro-batch-size 1 --global-batch-size 256 --recompute-granularity full "
        "--recompute-method uniform --recompute-num-layers 1",
    ),
    (
        "torchrun -m torchtitan.train --training.local_batch_size 8 --training.global_batch_size 64",
        "torchrun -m torchtitan.train --training.local_batch_size 4 --training.global_batch_size 64",
    ),
    (
        "tune run full_finetune_single_device --config x.yaml batch_size=4 gradient_accumulation_steps=8",
        "tune run full_finetune_single_device --config x.yaml batch_size=2 gradient_accumulation_steps=16",
    ),
    (
        "python train.py --batch_size=12 --gradient_accumulation_steps=40",
        "python train.py --batch_size=6 --gradient_accumulation_steps=80",
    ),
    ("python train.py --batch_size=12", None),
    ("python train.py", None),
)


@pytest.mark.parametrize(("line", "expected"), TRAINERS)
def test_trainers(line, expected):
    assert after(line, traceback(OOM)) == expected


def test_the_global_batch_stays():
    for micro in range(2, 200):
        new = smaller_micro_batch(micro)
        assert 1 <= new <= micro // 2
        assert micro % new == 0


def test_a_megatron_line_without_a_global_batch_says_so():
    line = "torchrun pretrain_gpt.py --micro-batch-size 4"
    death = judge(ended(traceback(OOM)))
    change = smaller(setting(line), death, shlex.split(line))
    assert change is None or "--recompute-granularity" in change.setting.words
    assert "global batch is not stated" in why_not(shlex.split(line), death)


def test_llama_factory_settings_are_laid_over_its_file(tmp_path):
    path = tmp_path / "sft.yaml"
    path.write_text("model_name_or_path: x\nper_device_train_batch_size: 4\ngradient_accumulation_steps: 2\n")
    line = f"llamafactory-cli train {path} learning_rate=1e-5"
    first = after(line, traceback(OOM))
    assert first == f"{line} per_device_train_batch_size=2 gradient_accumulation_steps=4"
    assert after(first, traceback(OOM)) == f"{line} per_device_train_batch_size=1 gradient_accumulation_steps=8"


def test_places_and_knobs():
    line = "python train.py --bs {micro_batch} --accum {grad_accum}"
    start = with_plan(shlex.split(line), Plan(knobs=tuple(parse_knobs("micro_batch=8,grad_accum=1").items())))
    assert start.words[-3:] == ("8", "--accum", "1")
    change = smaller(start, judge(ended(traceback(OOM))), shlex.split(line))
    assert change.setting.words == ("python", "train.py", "--bs", "4", "--accum", "2")
    assert dict(change.setting.plan.knobs) == {"micro_batch": 4, "grad_accum": 2}
    assert change.setting.plan.generation == 1


def test_a_plan_of_the_guard_is_shrunk_in_the_store():
    change = smaller(setting("python train.py", **{"micro_batch@64": 4}), judge(ended(traceback(OOM))), ["python"])
    assert change.setting.plan.get("micro_batch") == 2


@pytest.mark.parametrize("text", ["micro_batch", "=3", "a=", "a b=3", "micro_batch=8,,"])
def test_nonsense_plans_are_refused(text):
    with pytest.raises(InputError):
        parse_knobs(text)


def test_pieces_are_joined_before_the_batch_shrinks(monkeypatch):
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:128")
    text = OOM.replace("77.00 GiB is", "60.00 GiB is").replace("100.00 MiB", "17.50 GiB")
    start = setting("torchrun x.py --per_device_train_batch_size 8")
    death = judge(ended(traceback(text)))
    assert death.found.cause == "fragmentation"
    change = smaller(start, death, start.words)
    assert change.setting.words == start.words
    assert dict(change.setting.environment) == {
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "PYTORCH_ALLOC_CONF": "max_split_size_mb:128,expandable_segments:True",
    }
    second = smaller(change.setting, death, start.words)
    assert "4" in second.setting.words
    assert second.setting.environment == change.setting.environment


ENGINES = (
    ("vllm serve m", CAPTURE + OOM, "vllm serve m --gpu-memory-utilization 0.9"),
    ("vllm serve m --gpu-memory-utilization=0.95", CAPTURE + OOM, "vllm serve m --gpu-memory-utilization=0.93"),
    ("vllm serve m", LOAD + OOM, None),
    ("vllm serve m --max-num-batched-tokens 8192", PROFILE + OOM, "vllm serve m --max-num-batched-tokens 4096"),
    ("vllm serve m --gpu_memory_utilization 0.8", NO_BLOCKS, "vllm serve m --gpu_memory_utilization 0.95"),
    ("vllm serve m --gpu-memory-utilization 0.95", NO_BLOCKS,
     "vllm serve m --gpu-memory-utilization 0.95 --max-num-batched-tokens 2048"),
    ("vllm serve m --max-model-len 131072", TOO_LONG, "vllm serve m --max-model-len 61520"),
    ("python -m vllm.entrypoints.openai.api_server --model m --max-model-len 128K", TOO_LONG,
     "python -m vllm.entrypoints.openai.api_server --model m --max-model-len 61520"),
    ("vllm serve m", CASE_START := "ValueError: Free memory on device cuda:0 (60.0/79.1 GiB) on startup is less than "
     "desired GPU memory utilization (0.9, 71.2 GiB). Decrease GPU memory utilization",
     "vllm serve m --gpu-memory-utilization 0.75"),
    ("python -m sglang.launch_server --model-path m --mem-fraction-static 0.9",
     'Traceback (most recent call last):\n  File "/x/sglang/srt/cuda_graph_runner.py", line 3, in capture\n' + OOM,
     "python -m sglang.launch_server --model-path m --mem-fraction-static 0.88"),
    ("python -m sglang.launch_server --model-path m --mem-fraction-static 0.7",
     "RuntimeError: Not enough memory. Please try to increase --mem-fraction-static.",
     "python -m sglang.launch_server --model-path m --mem-fraction-static 0.75"),
    ("llama-server -m m.gguf -ngl 99 -c 32768 -ub 1024",
     "ggml_gallocr_reserve_n: failed to allocate CUDA0 buffer of size 9000000000\nllama_init: failed to allocate "
     "compute pp buffers\n", "llama-server -m m.gguf -ngl 99 -c 32768 -ub 512"),
)  # fmt: skip


@pytest.mark.parametrize(("line", "text", "expected"), ENGINES)
def test_engines_move_in_the_right_direction(line, text, expected):
    assert after(line, text) == expected


def test_two_opposite_failures_do_not_chase_each_other():
    """Too large at one share, too small at another: the shares close in between, and then something else shrinks."""
    now = setting("vllm serve m --gpu-memory-utilization 0.9 --max-model-len 131072")
    seen = []
    for text in (CAPTURE + OOM, NO_BLOCKS) * 12:
        change = smaller(now, judge(ended(text)), now.words)
        if change is None:
            break
        now = change.setting
        assert now.words not in seen
        seen.append(now.words)
        share = Words(now.words).number(("gpu_memory_utilization",))
        assert now.plan.get("share_too_small", 0.0) <= share <= now.plan.get("share_too_large", 1.0)
    assert any("--max-num-batched-tokens" in words for words in seen)


def test_a_kept_plan_of_an_engine_goes_into_its_flags():
    plan = Plan(generation=2, knobs=(("max_model_len", 4096), ("enforce_eager", True), ("share_too_large", 0.9)))
    words = with_plan(shlex.split("vllm serve m --max_model_len=8192"), plan).words
    assert words == ("vllm", "serve", "m", "--max_model_len=4096", "--enforce-eager")
    assert with_plan(words, plan).words == words


@pytest.mark.parametrize(
    ("line", "engine"),
    [
        ("vllm serve m", "vllm"),
        ("env A=1 /opt/bin/vllm serve m", "vllm"),
        ("python3 -m sglang.launch_server --model-path m", "sglang"),
        ("./build/bin/llama-server -m x.gguf", "llamacpp"),
        ("torchrun train.py", ""),
        ("vllm bench", ""),
    ],
)
def test_engines_are_known_by_their_words(line, engine):
    assert engine_of(shlex.split(line)) == engine


def test_launchers_that_retry_are_named():
    assert launcher_retries(shlex.split("torchrun --max-restarts=3 train.py")) == 3
    assert launcher_retries(shlex.split("torchrun train.py")) == 0
    assert launcher_retries(shlex.split("python train.py --max-restarts 3")) == 0


def test_flags_are_found_in_all_spellings():
    words = Words(["x", "--a-b", "1", "--a_b=2", "--c", "--d"])
    assert words.text(("a_b",)) == "2"
    words.put(("c",), "5", flag="--c")
    assert words.words == ["x", "--a-b", "1", "--a_b=2", "--c", "5", "--d"]
    words.drop(("a_b",))
    assert words.words == ["x", "--a-b", "1", "--c", "5", "--d"]
    assert trainer_of(["python", "x.py", "--lr", "3"]) is None
