"""Recipe files of torchtune and litgpt: what they say, what is refused, and the ledger that they make."""

import json

import pytest

from ullage.cli import main
from ullage.errors import InputError
from ullage.read.tuner_recipes import read_tuner

TUNE = """
output_dir: /tmp/out
tokenizer: {_component_: torchtune.models.llama3.llama3_tokenizer, max_seq_len: 2048}
model:
  _component_: torchtune.models.llama3_2.lora_llama3_2_1b
  lora_attn_modules: ['q_proj', 'v_proj', 'output_proj']
  apply_lora_to_mlp: True
  lora_rank: 64
  lora_alpha: 128
  lora_dropout: 0.0
checkpointer: {_component_: torchtune.training.FullModelHFCheckpointer, checkpoint_dir: /tmp/Llama-3.2-1B-Instruct/}
optimizer: {_component_: torch.optim.AdamW, fused: True, lr: 3e-4}
loss: {_component_: torchtune.modules.loss.LinearCrossEntropyLoss}
batch_size: 4
gradient_accumulation_steps: 8
dtype: bf16
enable_activation_checkpointing: False
enable_activation_offloading: False
compile: False
"""
LITGPT = """
checkpoint_dir: checkpoints/google/gemma-2b
precision: bf16-true
quantize: bnb.nf4
devices: 2
num_nodes: 1
lora_r: 16
lora_dropout: 0.1
lora_query: true
lora_key: false
lora_value: true
lora_mlp: true
train: {global_batch_size: 12, micro_batch_size: 2, max_seq_length: 512}
optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.0002}}
"""

pytest.importorskip("yaml")


def words(tmp_path, text, kind, num_gpus=1, name="recipe.yaml"):
    path = tmp_path / name
    path.write_text(text)
    return read_tuner(kind, str(path), num_gpus)


def test_a_recipe_of_torchtune(tmp_path):
    found = words(tmp_path, TUNE, "torchtune")
    assert (found.model, found.seq_len, found.micro_batch_size, found.grad_accum) == (
        "Llama-3.2-1B-Instruct",
        2048,
        4,
        8,
    )
    assert found.lora.rank == 64 and found.lora.targets == ("q_proj", "v_proj", "output_proj", "mlp")
    assert (found.method, found.loss, found.optimizer, found.optimizer_impl) == ("lora", "chunked", "adamw", "fused")
    assert found.recompute.kind == "none" and found.recompute.given and not found.offload and not found.said


def test_names_of_components_say_how_the_base_is_kept(tmp_path):
    quantised = words(tmp_path, TUNE.replace(".lora_llama", ".qlora_llama"), "torchtune")
    assert (quantised.method, quantised.base_quantization) == ("qlora", "nf4")
    whole = words(tmp_path, TUNE.replace(".lora_llama", ".llama"), "torchtune")
    assert (whole.method, whole.lora) == ("full", None)
    assert words(tmp_path, TUNE.replace("lora_rank", "use_dora: True\n  lora_rank"), "torchtune").method == "dora"


def test_what_lives_on_the_host(tmp_path):
    text = TUNE.replace("offloading: False", "offloading: True") + "fsdp_cpu_offload: True\n"
    assert words(tmp_path, text, "torchtune", 8).offload == (
        ("activations", "cpu"),
        ("params", "cpu"),
        ("optimizer", "cpu"),
    )


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ("loss:", "was_loss:", "trains nothing: it has no loss"),
        ("dtype: bf16", "dtype: fp32", "training in fp32"),
        ("LinearCrossEntropyLoss", "DPOLoss", "the loss DPOLoss"),
        ("torch.optim.AdamW", "my.Optimizer", "the optimizer my.Optimizer"),
        ("dtype:", "quantizer: {groupsize: 256}\ndtype:", "quantisation-aware"),
        ("dtype:", "teacher_model: {a: b}\ndtype:", "a teacher"),
        ("dtype:", "tensor_parallel_dim: 2\ndtype:", "tensor parallelism"),
        ("llama3_2.lora", "llama3_2_vision.lora", "vision encoder"),
        ("lora_rank: 64", "lora_rank: many", "lora_rank"),
    ],
)
def test_recipes_of_another_kind_are_refused(tmp_path, old, new, match):
    assert old in TUNE
    with pytest.raises(InputError, match=match):
        words(tmp_path, TUNE.replace(old, new), "torchtune")


def test_a_recipe_of_one_device_wants_one(tmp_path):
    words(tmp_path, TUNE, "torchtune", 1, "1B_lora_single_device.yaml")
    with pytest.raises(InputError, match="one device"):
        words(tmp_path, TUNE, "torchtune", 8, "1B_lora_single_device.yaml")


def test_settings_that_nobody_knows_are_named(tmp_path):
    assert "frobnicate" in " ".join(words(tmp_path, TUNE + "frobnicate: 3\n", "torchtune").said)


def test_a_configuration_of_litgpt(tmp_path):
    found = words(tmp_path, LITGPT, "litgpt", 2)
    assert (found.model, found.seq_len, found.micro_batch_size, found.grad_accum) == ("google/gemma-2b", 512, 2, 3)
    assert found.lora.targets == ("query", "value", "mlp") and found.lora.dropout == 0.1
    assert (found.method, found.base_quantization) == ("qlora", "nf4") and not found.said


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ("devices: 2", "devices: 4", "make 4 GPUs"),
        ("bf16-true", "bf16-mixed", "training in bf16-mixed"),
        ("bnb.nf4", "int3", "quantize"),
        ("lora_r: 16\n", "", "cannot be trained itself"),
        ("torch.optim.AdamW", "my.Optimizer", "the optimizer my.Optimizer"),
        ("micro_batch_size: 2", "micro_batch_size: 0", "micro_batch_size"),
    ],
)
def test_configurations_that_are_not_followed_are_refused(tmp_path, old, new, match):
    assert old in LITGPT
    with pytest.raises(InputError, match=match):
        words(tmp_path, LITGPT.replace(old, new), "litgpt", 2)


@pytest.mark.parametrize(
    ("text", "kind", "machine"), [(TUNE, "torchtune", "1xA100-80GB"), (LITGPT, "litgpt", "2xA10G")]
)
def test_a_recipe_makes_a_ledger(tmp_path, capsys, text, kind, machine):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    code = main(["fit", "train", "--from", f"{kind}:{path}", "--on", machine, "--json", "--no-advice"])
    found = json.loads(capsys.readouterr().out)
    assert code == found["exit_code"] and found["worst"]["allocated_peak_bytes"] > 2**30
    assert not [said for said in found["job"]["assumed"] if "precision" in said or "micro-batch" in said]
    assert main(["fit", "train", "--from", f"{kind}:{path}", "--on", machine, "--micro-batch", "2"]) == 2
    assert "says that already: --micro-batch" in capsys.readouterr().err
