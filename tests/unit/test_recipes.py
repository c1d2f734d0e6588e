"""Fine-tuning recipes of the Trainer, TRL, LLaMA-Factory and axolotl, read into a job."""

import json

import pytest

from ullage.cli import main
from ullage.errors import InputError, UllageError
from ullage.read.recipe_fields import Fields
from ullage.read.recipes import READERS, read_fields
from ullage.spec.rlhf import Rlhf, Rollout

LLAMAFACTORY = """\
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
dataset: identity,alpaca_en_demo
template: llama3
cutoff_len: 2048
output_dir: saves/llama3-8b/lora/sft
logging_steps: 10
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
bf16: true
ddp_timeout: 180000000
resume_from_checkpoint: null
"""
AXOLOTL = """\
base_model: NousResearch/Llama-3.2-1B
datasets:
  - path: teknium/GPT4-LLM-Cleaned
    type: alpaca
adapter: qlora
load_in_4bit: true
sequence_len: 4096
sample_packing: true
lora_r: 32
lora_dropout: 0.05
lora_target_linear: true
gradient_accumulation_steps: 4
micro_batch_size: 2
optimizer: paged_adamw_32bit
bf16: auto
gradient_checkpointing: true
flash_attention: true
"""


def recipe(kind, values):
    return READERS[kind](Fields(values, "recipe"))


def loaded(text):
    import yaml

    return yaml.safe_load(text)


def test_llamafactory_lora():
    words = recipe("llamafactory", loaded(LLAMAFACTORY))
    assert (words.micro_batch_size, words.grad_accum, words.seq_len) == (1, 8, 2048)
    assert words.lora.rank == 8 and words.lora.targets == ("all-linear",)
    assert words.recompute and words.precision == "bf16" and words.base_quantization is None
    assert (words.optimizer, words.optimizer_impl) == ("adamw", "fused")
    assert words.unknown == ()


@pytest.mark.parametrize(
    ("settings", "precision"),
    [({"pure_bf16": True}, "bf16"), ({"bf16": True}, "amp"), ({"fp16": True}, "amp")],
)
def test_llamafactory_trains_fp32_parameters_unless_pure(settings, precision):
    words = recipe("llamafactory", {"finetuning_type": "full", **settings})
    assert words.precision == precision
    assert words.compute == ("float16" if "fp16" in settings else "bfloat16")
    assert words.lora is None


def test_axolotl_qlora():
    words = recipe("axolotl", loaded(AXOLOTL))
    assert (words.micro_batch_size, words.grad_accum, words.seq_len) == (2, 4, 4096)
    assert words.base_quantization == "nf4" and words.lora.rank == 32 and words.lora.dropout == 0.05
    assert words.packing and words.recompute and words.attention == "flash"
    assert words.optimizer == "paged_adamw"
    assert words.unknown == ()


def test_trl_defaults_differ_from_the_trainer():
    trl, trainer = recipe("trl", {}), recipe("trainer", {})
    assert (trl.precision, trl.recompute, trl.seq_len) == ("amp", True, 1024)
    assert (trainer.precision, trainer.recompute, trainer.seq_len) == ("bf16", False, None)
    assert trl.micro_batch_size == trainer.micro_batch_size == 8


def test_a_command_line_is_read():
    fields = read_fields(
        "trl sft --model_name_or_path Qwen/Qwen2.5-0.5B --use_peft --lora_r=32 --lora_target_modules q_proj k_proj "
        "--per-device-train-batch-size 2 --bf16 false"
    )
    words = READERS["trl"](fields)
    assert words.lora.rank == 32 and words.lora.targets == ("q_proj", "k_proj")
    assert words.micro_batch_size == 2 and words.precision == "fp32"


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("llamafactory", {"per_device_train_batch_size": 0}),
        ("llamafactory", {"stage": "ppo"}),
        ("llamafactory", {"use_galore": True}),
        ("llamafactory", {"quantization_bit": 3}),
        ("llamafactory", {"optim": "no_such"}),
        ("axolotl", {"adapter": "lora"}),
        ("axolotl", {"micro_batch_size": True}),
        ("axolotl", {"tensor_parallel_size": 2}),
        ("axolotl", {"rl": "ebft"}),
        ("trainer", {"gradient_checkpointing": "perhaps"}),
        ("trainer", {"fsdp": "no_shard auto_wrap"}),
        ("trl", {"use_peft": True, "lora_dropout": 1.5}),
        ("trainer", {"dtype": "int3"}),
        ("trainer", []),
    ],
)
def test_wrong_values_are_one_sentence(kind, values):
    with pytest.raises(InputError) as caught:
        recipe(kind, values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "values", "expected"),
    [
        ("llamafactory", {"stage": "dpo"}, Rlhf(kind="dpo", reference="adapter", log_probs="full")),
        (
            "llamafactory",
            {"stage": "dpo", "finetuning_type": "full"},
            Rlhf(kind="dpo", reference="copy", log_probs="full"),
        ),
        (
            "llamafactory",
            {"stage": "dpo", "pref_loss": "simpo"},
            Rlhf(kind="simpo", reference="none", log_probs="full"),
        ),
        ("llamafactory", {"stage": "rm"}, Rlhf(kind="rm", reference="none", log_probs="unused")),
        ("axolotl", {"rl": "ipo"}, Rlhf(kind="dpo", log_probs="rows")),
        ("axolotl", {"reward_model": True}, Rlhf(kind="rm", reference="none")),
        (
            "axolotl",
            {"rl": "grpo", "trl": {"use_vllm": True, "vllm_mode": "colocate", "max_completion_length": 256}},
            Rlhf(
                kind="grpo",
                reference="none",
                completion_len=256,
                log_probs="rows",
                rollout=Rollout(engine="vllm", memory_fraction=0.3),
            ),
        ),
        ("trl", {"precompute_ref_log_probs": True}, Rlhf(kind="dpo", reference="precomputed")),
        ("trl", {"script": "reward"}, Rlhf(kind="rm")),
        (
            "trl",
            {"num_generations": 8, "beta": 0.0, "steps_per_generation": 2},
            Rlhf(kind="grpo", reference="none", completion_len=512, steps_per_generation=2, rollout=Rollout()),
        ),
    ],
)
def test_preference_and_reinforcement_recipes_are_read(kind, values, expected):
    assert recipe(kind, values).rlhf == expected


def test_the_script_of_a_command_line_decides():
    line = "accelerate launch scripts/kto.py --model_name_or_path x --max_length 512"
    assert READERS["trl"](read_fields(line)).rlhf == Rlhf(kind="kto")
    assert READERS["trl"](read_fields("trl sft --model_name_or_path x")).rlhf is None


def test_unknown_settings_are_named():
    assert recipe("trainer", {"use_quantum_memory": True}).unknown == ("use_quantum_memory",)


def test_a_recipe_becomes_a_fit(tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text(LLAMAFACTORY)
    code = main(["fit", "train", "--from", f"llamafactory:{tmp_path / 'recipe.yaml'}", "--on", "1xH100", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert code == found["exit_code"] == 0
    assert found["job"]["micro_batch_size"] == 1
    assert found["job"]["seq_len"] == 2048


def test_a_deepspeed_file_beside_the_recipe_is_followed(tmp_path, capsys):
    (tmp_path / "ds.json").write_text(
        json.dumps(
            {"zero_optimization": {"stage": 3}, "bf16": {"enabled": "auto"}, "train_micro_batch_size_per_gpu": "auto"}
        )
    )
    text = LLAMAFACTORY.replace("finetuning_type: lora", "finetuning_type: full\ndeepspeed: ds.json")
    (tmp_path / "recipe.yaml").write_text(text)
    main(["fit", "train", "--from", f"llamafactory:{tmp_path / 'recipe.yaml'}", "--on", "8xH100", "--json"])
    assert json.loads(capsys.readouterr().out)["job"]["parallel"]["zero_stage"] == 3


@pytest.mark.parametrize(
    "text",
    ["- a\n- b\n", "a: &x [1]\nb: *x\n", "a: [", "model_name_or_path: 3", "", "!!python/object/apply:os.system [id]"],
)
def test_broken_files_are_refused(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(UllageError):
        READERS["trainer"](fields := read_fields(str(path)))
        fields.word("model_name_or_path")


def test_options_that_the_recipe_states_are_refused(tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text(LLAMAFACTORY)
    line = f"llamafactory:{tmp_path / 'recipe.yaml'}"
    assert main(["fit", "train", "--from", line, "--on", "1xH100", "--micro-batch", "4"]) == 2
    assert "--micro-batch" in capsys.readouterr().err
