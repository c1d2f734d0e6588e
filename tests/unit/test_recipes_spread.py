"""How recipes are launched and spread: Accelerate, DeepSpeed and FSDP around them; settings that change the loss."""

import json

import pytest
import yaml

from ullage.account.lora import copied_parameters
from ullage.cli.fit_train import DEFAULT_SEQ_LEN
from ullage.engines.training import step
from ullage.errors import InputError
from ullage.read.accelerate_parts import SHIPPED
from ullage.read.accelerate_yaml import parse_accelerate
from ullage.read.deepspeed_json import parse_deepspeed, refuse_deepspeed
from ullage.read.machine import parse_machine
from ullage.read.model_source import load_model
from ullage.read.recipes import read_fields, with_recipe
from ullage.spec.training import Evaluation, Lora, TrainingJob, TrainingParallel

ZERO2 = {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 2}, "mixed_precision": "bf16"}


def job(kind, settings, *, machine="8xH100", model="Qwen/Qwen2.5-0.5B", version="", where=None):
    """Return the job that settings, a line or a file of settings make."""
    stated = parse_machine(machine)
    bare = TrainingJob(
        model=load_model(model),
        machine=stated,
        engine="hf_trainer",
        engine_version=version,
        seq_len=DEFAULT_SEQ_LEN,
        parallel=TrainingParallel(data_parallel_size=stated.num_gpus),
    )
    if isinstance(settings, dict):
        from ullage.read.recipe_fields import Fields

        fields = Fields(dict(settings), where or "recipe")
    else:
        fields = read_fields(settings)
    return with_recipe(kind, fields, bare)


def written(folder, name, values):
    path = folder / name
    path.write_text(yaml.safe_dump(values) if name.endswith(("yaml", "yml")) else json.dumps(values))
    return str(path)


def test_a_trl_line_is_spread_by_the_configuration_that_it_names(tmp_path):
    path = written(tmp_path, "zero2.yaml", ZERO2)
    line = f"accelerate launch --config_file {path} trl/scripts/sft.py --model_name_or_path Qwen/Qwen2.5-0.5B"
    found = job("trl", line)
    assert (found.engine, found.parallel.zero_stage, found.parallel.fsdp) == ("deepspeed", 2, None)
    assert (found.precision.params, found.precision.master) == ("bfloat16", "float32")


@pytest.mark.parametrize(
    ("name", "engine", "stage", "sharding"),
    [
        ("zero3", "deepspeed", 3, None),
        ("fsdp2", "fsdp2", 0, "full_shard"),
        ("fsdp1", "fsdp1", 0, "full_shard"),
        ("multi_gpu", "hf_trainer", 0, None),
    ],
)
def test_trl_ships_configurations(name, engine, stage, sharding):
    found = job("trl", f"trl sft --model_name_or_path Qwen/Qwen2.5-0.5B --accelerate_config {name}")
    assert (found.engine, found.parallel.zero_stage, found.parallel.fsdp) == (engine, stage, sharding)
    assert name in SHIPPED


def test_a_configuration_that_is_not_there_is_refused():
    with pytest.raises(InputError, match="is not there"):
        job("trl", "accelerate launch --config_file nowhere.yaml trl/scripts/sft.py --bf16 true")


def test_a_line_for_other_ranks_is_refused():
    with pytest.raises(InputError, match="num_processes is 7"):
        job("trl", "accelerate launch --num_processes 7 scripts/grpo.py --model_name_or_path Qwen/Qwen2.5-0.5B")


def test_a_file_of_settings_stands_behind_the_line(tmp_path):
    path = written(tmp_path, "sft.yaml", {"max_length": 8192, "per_device_train_batch_size": 4, "env": {"A": "b"}})
    found = job("trl", f"trl sft --config {path} --per_device_train_batch_size 2")
    assert (found.seq_len, found.micro_batch_size) == (8192, 2)
    assert not any("env" in one for one in found.assumed)


def test_a_script_is_read_with_its_variables(tmp_path):
    path = tmp_path / "run.sh"
    ds = written(tmp_path, "ds.json", {"bf16": {"enabled": "auto"}, "zero_optimization": {"stage": 3}})
    path.write_text(
        f'#!/bin/bash\nDS="{ds}"\nMODEL="Qwen/Qwen2.5-0.5B"\nwhile [[ "$1" != "" ]]; do\n  --help) exit ;;\ndone\n'
        "torchrun --nproc_per_node 8 finetune.py \\\n  --model_name_or_path $MODEL --bf16 True \\\n"
        "  --per_device_train_batch_size 2 --model_max_length 512 --deepspeed ${DS}\n"
    )
    found = job("trainer", str(path))
    assert (found.engine, found.parallel.zero_stage) == ("deepspeed", 3)
    assert (found.micro_batch_size, found.seq_len) == (2, 512)
    assert not any("not known" in one for one in found.assumed)


@pytest.mark.parametrize("script", ["gkd", "dpo_online", "online_dpo", "nash_md", "prm", "tpo", "sdft"])
def test_scripts_that_hold_more_models_are_refused(script):
    with pytest.raises(InputError, match="is not followed"):
        job("trl", f"python examples/scripts/{script}.py --model_name_or_path Qwen/Qwen2.5-0.5B")


@pytest.mark.parametrize(
    ("script", "kind"), [("sft_vlm", None), ("grpo_vlm", "grpo"), ("gspo", "grpo"), ("reward", "rm")]
)
def test_scripts_are_known_by_their_first_word(script, kind):
    found = job("trl", f"python examples/scripts/{script}.py --model_name_or_path Qwen/Qwen2.5-0.5B")
    assert (found.rlhf.kind if found.rlhf else None) == kind


def test_trl_makes_no_logits_of_all_tokens():
    assert job("trl", {}).loss == "tiled"
    assert job("trl", {}, version="1.16").loss == "tiled"
    assert job("trl", {}, version="0.24").loss is None
    assert job("trl", {"use_liger_kernel": True}, version="0.24").loss == "liger"
    liger = job("trl", {"use_liger_kernel": True})
    assert liger.loss == "tiled" and dict(liger.flags)["fused_kernels"] == "rms_norm,rope,swiglu"


@pytest.mark.parametrize("engine", ["hf_trainer", "fsdp2", "deepspeed"])
def test_tiles_take_less_than_all_logits(engine):
    settings = {
        "hf_trainer": {},
        "fsdp2": {"fsdp": True},
        "deepspeed": {"deepspeed": {"zero_optimization": {"stage": 2}}},
    }
    peaks = []
    for version in ("", "0.24"):
        found = job("trl", {"per_device_train_batch_size": 8, **settings[engine]}, version=version)
        assert found.engine == engine
        peaks.append(step(found).ranks[0].peak.allocated.bytes)
    logits = 8 * 1024 * 151_936 * 2
    assert peaks[0] < peaks[1] - logits


def test_a_length_that_is_none_is_left_to_the_flags():
    assert job("trl", {"max_length": None}).seq_len == DEFAULT_SEQ_LEN
    assert job("trl", {}).seq_len == 1024


def test_settings_of_the_model_count():
    found = job("trl", {"model_init_kwargs": {"dtype": "bfloat16", "attn_implementation": "eager"}})
    assert (found.precision.params, found.attention) == ("bfloat16", "eager")


@pytest.mark.parametrize(
    ("model", "targets"), [("EleutherAI/pythia-1b", ("query_key_value",)), ("Qwen/Qwen2.5-0.5B", ("q_proj", "v_proj"))]
)
def test_adapters_without_targets_go_where_peft_puts_them(model, targets):
    assert job("trl", {"use_peft": True}, model=model).lora.targets == targets


@pytest.mark.parametrize(
    "settings",
    [
        {"label_smoothing_factor": 0.1},
        {"lora_target_parameters": ["a"]},
        {"teacher_model_name_or_path": "x"},
        {"use_lora": True},
        {"attn_implementation": "no_such"},
        {"fsdp": True, "fsdp_config": {"auto_wrap_policy": "SIZE_BASED_WRAP"}},
    ],
)
def test_what_matters_and_is_not_followed_is_refused(settings):
    with pytest.raises(InputError) as caught:
        job("trl", settings)
    assert "\n" not in str(caught.value)


def test_fsdp_makes_what_is_trained_fp32():
    found = job(
        "trainer", {"fsdp": "full_shard auto_wrap", "bf16": True, "fsdp_config": {"activation_checkpointing": True}}
    )
    assert found.engine == "fsdp2" and found.precision.params == "float32" and found.precision.compute == "bfloat16"
    assert found.recompute.kind == "full"
    old = job("trainer", {"fsdp": "full_shard", "bf16": True}, version="4.57")
    assert old.engine == "fsdp1" and old.precision.params == "float32"
    pure = job("axolotl", {"bf16": "full", "fsdp_config": {"offload_params": True}, "fsdp_version": 2})
    assert pure.precision.params == "bfloat16" and ("params", "cpu") in pure.offload


def test_hybrid_shards_have_a_group():
    found = job(
        "axolotl",
        {"bf16": True, "dp_shard_size": 4, "dp_replicate_size": 2, "fsdp_version": 2, "fsdp_config": {"x": 1}},
    )
    assert (found.engine, found.parallel.fsdp, found.parallel.shard_group_size) == ("fsdp2", "hybrid", 4)


def test_a_compile_backend_compiles():
    assert job("trainer", {"torch_compile_backend": "inductor"}).compile
    assert not job("trainer", {}).compile


def test_checkpoints_are_reentrant_as_the_program_says():
    flags = [
        dict(job("trl", {"gradient_checkpointing_kwargs": {"use_reentrant": True}}).flags),
        dict(job("llamafactory", {}).flags),
        dict(job("llamafactory", {"use_reentrant_gc": False}).flags),
        dict(job("axolotl", {"gradient_checkpointing": True}).flags),
        dict(
            job(
                "axolotl", {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
            ).flags
        ),
    ]
    assert [one["use_reentrant"] for one in flags] == ["true", "true", "false", "true", "false"]


def test_evaluation_is_read():
    assert job("trainer", {"eval_strategy": "steps"}).evaluation == Evaluation(batch_size=8)
    assert job("trainer", {"per_device_eval_batch_size": 4}).evaluation is None
    assert job("llamafactory", {"eval_strategy": "steps", "per_device_eval_batch_size": 2}).evaluation.batch_size == 2
    found = job("axolotl", {"val_set_size": 0.1, "micro_batch_size": 3, "eval_sequence_len": 256})
    assert (found.evaluation.batch_size, found.evaluation.seq_len) == (3, 256)
    assert job("axolotl", {"val_set_size": 0.0}).evaluation is None
    compared = job("trl", "trl dpo --model_name_or_path Qwen/Qwen2.5-0.5B --eval_strategy steps")
    assert compared.evaluation is None and any("evaluation, 8 sequences" in one for one in compared.assumed)


def test_the_buckets_of_auto_are_made_of_the_hidden_size():
    zero = {"stage": 3, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto"}
    found = job("trainer", {"deepspeed": {"zero_optimization": {**zero, "stage3_param_persistence_threshold": "auto"}}})
    section = json.loads(found.native)["zero_optimization"]
    assert section["reduce_bucket_size"] == 896**2
    assert section["stage3_prefetch_bucket_size"] == 9 * 896**2 // 10
    assert section["stage3_param_persistence_threshold"] == 8960


def test_settings_of_stage_3_have_short_names():
    config = {"zero_optimization": {"stage": 3, "max_live_parameters": 7, "prefetch_bucket_size": 5}, "_comment": "x"}
    found = parse_deepspeed(config, where="f")
    assert (found.zero.max_live, found.zero.prefetch_bucket, found.unknown) == (7, 5, ())


@pytest.mark.parametrize(
    "config",
    [
        {"tensor_parallel": {"autotp_size": 2}},
        {"zero_optimization": {"stage": 3, "mics_shard_size": 8}},
        {"bf16": {"enabled": True, "bf16_optimizer_states": True}},
        {"data_types": {"grad_accum_dtype": "fp32"}},
        {"sequence_parallel_size": 2},
    ],
)
def test_ways_of_deepspeed_that_are_not_followed_are_refused(config):
    with pytest.raises(InputError, match="is not followed"):
        refuse_deepspeed(config, where="f")


def test_states_in_8_bits_under_zero():
    peaks = {}
    for name in ("adamw_torch", "adamw_bnb_8bit"):
        found = job("trainer", {"optim": name, "bf16": True, "deepspeed": {"zero_optimization": {"stage": 1}}})
        states = [
            term for term in step(found).ranks[0].after_step.allocated.children if term.name == "optimizer_states"
        ]
        peaks[name] = states[0].bytes
    assert 3.8 < peaks["adamw_torch"] / peaks["adamw_bnb_8bit"] < 4


def test_accelerate_spreads_sequences_and_compiles():
    config = {
        "distributed_type": "FSDP",
        "fsdp_config": {"fsdp_version": 2, "fsdp_reshard_after_forward": True},
        "parallelism_config": {"parallelism_config_cp_size": 2, "parallelism_config_dp_shard_size": 4},
        "dynamo_config": {"dynamo_backend": "INDUCTOR"},
    }
    found = parse_accelerate(config, where="f")
    assert (found.context, found.compile, found.num_gpus, found.engine) == (2, True, None, "fsdp2")
    with pytest.raises(InputError, match="tp_size above 1"):
        parse_accelerate({"parallelism_config": {"parallelism_config_tp_size": 2}}, where="f")
    with pytest.raises(InputError, match="NO_WRAP"):
        parse_accelerate({"distributed_type": "FSDP", "fsdp_config": {"fsdp_auto_wrap_policy": "NO_WRAP"}}, where="f")


def test_axolotl_runs_by_its_own_rules():
    base = {"adapter": "qlora", "load_in_4bit": True, "lora_target_linear": True, "bf16": True}
    narrow, wide = job("axolotl", {**base, "quantize_moe_experts": True}), job("axolotl", base)
    assert "axolotl" in narrow.engine_version
    assert [dict(one.flags)["experts"] for one in (narrow, wide)] == ["quantised", "wide"]
    weights = []
    for settings in ({**base, "quantize_moe_experts": True}, base, {**base, "llama4_linearized_experts": True}):
        found = step(job("axolotl", settings, model="Qwen/Qwen3-30B-A3B", machine="1xH100"))
        weights.append(found.ranks[0].after_step.allocated.children[0].bytes)
    assert weights[0] < weights[1] / 2 and weights[2] == weights[0]


def test_the_allocator_is_set_by_programs_and_by_lines():
    assert job("axolotl", {}).alloc_conf == "expandable_segments:True"
    assert job("trl", "trl sft --bf16 true").alloc_conf == ""
    line = "PYTORCH_ALLOC_CONF=max_split_size_mb:128 trl sft --bf16 true"
    assert job("trl", line).alloc_conf == "max_split_size_mb:128"


def test_axolotl_fuses_what_its_switches_say():
    cut = job("axolotl", {"plugins": ["axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin"]})
    assert (cut.loss, dict(cut.flags)["fused_kernels"]) == ("liger", "")
    liger = job("axolotl", {"liger_rms_norm": True, "liger_glu_activation": True, "plugins": ["a.liger.LigerPlugin"]})
    assert (liger.loss, dict(liger.flags)["fused_kernels"]) == (None, "rms_norm,swiglu")


@pytest.mark.parametrize(
    "settings",
    [
        {"plugins": ["axolotl.integrations.spectrum.SpectrumPlugin"]},
        {"plugins": ["axolotl.integrations.grokfast.GrokfastPlugin"]},
        {"unfrozen_parameters": ["a"]},
        {"selective_checkpointing": True},
        {"peft_layers_to_transform": [1]},
        {"optimizer": "dion"},
    ],
)
def test_what_axolotl_does_that_is_not_followed_is_refused(settings):
    with pytest.raises(InputError) as caught:
        job("axolotl", settings)
    assert "\n" not in str(caught.value)


def test_settings_of_adapters_say_nothing_without_adapters():
    found = job("axolotl", {"lora_r": 8, "lora_target_linear": True, "bf16": True, "fp16": False})
    assert found.lora is None and not any("not known" in one for one in found.assumed)


def test_llamafactory_v1_is_refused_in_a_sentence():
    with pytest.raises(InputError, match="v1"):
        job("llamafactory", {"model": "Qwen/Qwen3-0.6B", "train_dataset": "x", "micro_batch_size": 1})


def test_llamafactory_settings_that_train_more():
    resized = job("llamafactory", {"resize_vocab": True})
    assert resized.lora.trained_modules == ("embed_tokens", "lm_head")
    assert job("llamafactory", {"finetuning_type": "full", "use_muon": True}).optimizer == "muon"


def test_a_tied_head_is_copied_by_itself():
    model = load_model("Qwen/Qwen2.5-0.5B")
    assert model.tied_embeddings
    one = copied_parameters(model, Lora(rank=8, targets=("q_proj",), trained_modules=("embed_tokens",)))
    two = copied_parameters(model, Lora(rank=8, targets=("q_proj",), trained_modules=("embed_tokens", "lm_head")))
    assert two.num_elements == 2 * one.num_elements > 0


def test_towers_are_said_not_to_be_counted():
    found = job("llamafactory", {}, model="Qwen/Qwen2.5-VL-7B-Instruct")
    assert any("towers" in one for one in found.assumed)


def test_llamafactory_under_unsloth():
    settings = {"use_unsloth": True, "quantization_bit": 4, "lora_target": "all"}
    found = job("llamafactory", settings, machine="1xH100", model="meta-llama/Llama-3.1-8B-Instruct")
    assert "unsloth" in found.engine_version and step(found).job.engine == "unsloth"
    assert ("activations", "cpu") in job("llamafactory", {"use_unsloth_gc": True}).offload


@pytest.mark.parametrize("name", ["a" * 5000, "\0", "no/such.json", ""])
@pytest.mark.parametrize("key", ["deepspeed", "config_file"])
def test_names_of_files_that_cannot_be_are_refused(key, name):
    settings = {key: name}
    if name == "" and key == "deepspeed":
        assert job("trainer", settings).engine == "hf_trainer"
        return
    if name == "":
        assert job("trl", settings).parallel.zero_stage == 0
        return
    with pytest.raises(InputError) as caught:
        job("trl", settings)
    assert "\n" not in str(caught.value)


def test_a_line_may_name_its_file_alone(tmp_path):
    lora = written(tmp_path, "lora.yaml", {"cutoff_len": 512, "lora_rank": 4})
    assert job("llamafactory", f"llamafactory-cli train {lora}").seq_len == 512
    fsdp = written(
        tmp_path,
        "fsdp.yaml",
        {"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 1}, "mixed_precision": "bf16"},
    )
    found = job("llamafactory", f"accelerate launch --config_file {fsdp} src/train.py {lora} --lora_rank 16")
    assert (found.lora.rank, found.seq_len, found.parallel.fsdp) == (16, 512, "full_shard")
    full = written(tmp_path, "full.yml", {"sequence_len": 256, "bf16": True})
    assert job("axolotl", f"axolotl train {full} --micro-batch-size 3").micro_batch_size == 3
    with pytest.raises(InputError, match="is not there"):
        job("axolotl", "axolotl train nowhere.yaml")
    with pytest.raises(InputError, match="neither"):
        job("axolotl", "axolotl train")
