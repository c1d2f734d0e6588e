"""Lines and scripts of ms-swift, read into a job."""

import pytest

from ullage.errors import InputError
from ullage.read.recipe_fields import Fields
from ullage.read.recipes import READERS, read_fields
from ullage.spec.rlhf import Rlhf, Rollout
from ullage.spec.training import Evaluation

SCRIPT = """\
nproc_per_node=2

PYTORCH_CUDA_ALLOC_CONF='expandable_segments:True' \\
CUDA_VISIBLE_DEVICES=0,1 \\
NPROC_PER_NODE=$nproc_per_node \\
swift sft \\
    --model Qwen/Qwen2.5-7B-Instruct \\
    --tuner_type lora \\
    --torch_dtype bfloat16 \\
    --per_device_train_batch_size 1 \\
    --per_device_eval_batch_size 2 \\
    --lora_rank 16 \\
    --target_modules all-linear \\
    --gradient_accumulation_steps $(expr 16 / $nproc_per_node) \\
    --split_dataset_ratio 0.01 \\
    --max_length 2048 \\
    --attn_impl flash_attn \\
    --deepspeed zero2 \\
"""


def recipe(values, **more):
    return READERS["swift"](Fields({**values, **more}, "recipe"))


def test_a_script_is_read(tmp_path):
    path = tmp_path / "lora.sh"
    path.write_text(SCRIPT)
    fields = read_fields(str(path))
    assert fields.word("PYTORCH_ALLOC_CONF") == "expandable_segments:True"
    words = READERS["swift"](fields)
    assert (words.micro_batch_size, words.grad_accum, words.seq_len) == (1, 8, 2048)
    assert words.lora.rank == 16 and words.lora.targets == ("all-linear",) and words.lora.dropout == 0.05
    assert words.attention == "flash" and words.recompute and words.precision == "bf16"
    assert words.evaluation == Evaluation(batch_size=2)
    assert words.deepspeed["zero_optimization"]["stage"] == 2
    assert words.deepspeed["zero_optimization"]["reduce_bucket_size"] == 200_000_000
    assert words.program == "ms-swift" and words.unknown == ()


def test_its_defaults():
    words = recipe({})
    assert (words.micro_batch_size, words.grad_accum, words.seq_len, words.lora.rank) == (1, 1, None, 8)
    assert words.recompute and words.evaluation is None and words.loss is None
    assert recipe({"tuner_type": "full"}).lora is None


@pytest.mark.parametrize(
    ("settings", "precision", "compute"),
    [
        ({"torch_dtype": "bfloat16"}, "bf16", "bfloat16"),
        ({"torch_dtype": "float16", "tuner_type": "full"}, "amp", "float16"),
        ({"torch_dtype": "float32"}, "amp", "float16"),
        ({"torch_dtype": "float32", "bf16": "true", "fp16": "false"}, "amp", "bfloat16"),
        ({"torch_dtype": "float32", "fp16": "false"}, "fp32", "float32"),
    ],
)
def test_weights_decide_about_mixed_precision(settings, precision, compute):
    words = recipe(settings)
    assert (words.precision, words.compute) == (precision, compute)


def test_checkpoints_are_reentrant_but_under_plain_ddp():
    assert dict(recipe({}).flags)["use_reentrant"] == "false"
    assert dict(recipe({"deepspeed": "zero3"}).flags)["use_reentrant"] == "true"
    stated = {"deepspeed": "zero3", "gradient_checkpointing_kwargs": '{"use_reentrant": false}'}
    assert dict(recipe(stated).flags)["use_reentrant"] == "false"


def test_fsdp2_recomputes_by_itself():
    words = recipe({"fsdp": "fsdp2"})
    assert words.fsdp.version == 2 and words.fsdp.checkpoint and not words.recompute


@pytest.mark.parametrize(
    ("settings", "expected", "length"),
    [
        ({"rlhf_type": "dpo", "max_length": 1024}, Rlhf(kind="dpo"), 1024),
        (
            {
                "rlhf_type": "grpo", "max_length": 1000, "max_completion_length": 24, "use_vllm": True,
                "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.5, "sleep_level": 1, "offload_model": True,
                "offload_optimizer": True,
            },
            Rlhf(
                kind="grpo", reference="adapter", completion_len=24,
                rollout=Rollout(engine="vllm", memory_fraction=0.5, sleeps=True, alone=True),
            ),
            1024,
        ),
        (
            {"rlhf_type": "grpo", "tuner_type": "full", "beta": 0.0, "use_vllm": True, "vllm_mode": "server"},
            Rlhf(kind="grpo", reference="none", completion_len=512, rollout=Rollout(engine="server")),
            None,
        ),
    ],
)  # fmt: skip
def test_preference_and_reinforcement(settings, expected, length):
    words = recipe(settings)
    assert (words.rlhf, words.seq_len) == (expected, length)


@pytest.mark.parametrize(
    "settings",
    [
        {"tuner_type": "reft"},
        {"task_type": "embedding"},
        {"freeze_parameters_ratio": 0.5},
        {"trainable_parameters": ["a"]},
        {"teacher_model": "x"},
        {"rlhf_type": "gkd"},
        {"quant_method": "hqq", "quant_bits": 4},
        {"use_galore": True},
        {"torch_dtype": "int8"},
    ],
)
def test_what_is_not_followed_is_refused(settings):
    with pytest.raises(InputError) as caught:
        recipe(settings)
    assert "\n" not in str(caught.value)


def test_a_base_in_four_bits():
    assert recipe({"quant_method": "bnb", "quant_bits": 4}).base_quantization == "nf4"
    assert recipe({"quant_method": "bnb", "quant_bits": 8}).base_quantization == "int8"


def test_a_reward_model_stands_on_the_card():
    words = recipe({"rlhf_type": "grpo", "max_length": 512, "reward_model": "x/y"})
    assert words.rlhf.reward_model
    assert not recipe({"rlhf_type": "grpo", "max_length": 512}).rlhf.reward_model


def test_megatron_lines_are_refused():
    with pytest.raises(InputError, match="megatron"):
        recipe({"micro_batch_size": 1, "tensor_model_parallel_size": 2})
