"""Recipes with any settings: each ends in a job or in one documented sentence."""

import os

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ullage.errors import UllageError
from ullage.read.machine import parse_machine
from ullage.read.model_source import load_model
from ullage.read.recipe_fields import Fields
from ullage.read.recipes import READERS, with_recipe
from ullage.spec.training import TrainingJob
from ullage.training_fit import fit_training

EXAMPLES = int(os.environ.get("ULLAGE_FUZZ_EXAMPLES", "300"))
KEYS = (
    "per_device_train_batch_size", "micro_batch_size", "gradient_accumulation_steps", "cutoff_len", "sequence_len",
    "max_length", "optim", "optimizer", "bf16", "fp16", "pure_bf16", "dtype", "finetuning_type", "stage", "adapter",
    "lora_rank", "lora_r", "lora_target", "lora_target_linear", "lora_target_modules", "lora_dropout", "use_peft",
    "use_dora", "load_in_4bit", "load_in_8bit", "quantization_bit", "gradient_checkpointing", "flash_attn",
    "flash_attention", "attn_implementation", "deepspeed", "fsdp", "fsdp_config", "packing", "sample_packing",
    "activation_checkpointing_kwargs", "disable_gradient_checkpointing", "use_liger_kernel", "additional_target",
    "torch_compile", "plugins", "batch_size", "rl", "reward_model", "pref_loss", "trl", "vllm", "beta", "script",
    "max_completion_length", "num_generations", "steps_per_generation", "use_vllm", "vllm_gpu_memory_utilization",
    "precompute_ref_log_probs", "max_prompt_length",
)  # fmt: skip
VALUES = st.one_of(
    st.booleans(), st.none(), st.integers(-3, 10**20), st.floats(), st.text(max_size=12), st.just(float("nan")),
    st.sampled_from(
        ["full", "lora", "qlora", "sft", "dpo", "kto", "rm", "grpo", "orpo", "simpo", "server", "reward",
         "adamw_torch", "adamw_8bit", "adafactor", "full_shard auto_wrap",
         "auto", "bfloat16", "float32", "flash_attention_2", "fa2", "all", "q_proj,v_proj", "4", "1e-3", 1,
         2, 4, 8, 16, 2048]
    ),
    st.lists(st.sampled_from(["q_proj", "gate_proj", "\0", ""]), max_size=3),
    st.dictionaries(
        st.sampled_from(["every_n_layers", "zero_optimization", "offload_params"]), st.integers(-1, 4), max_size=2
    ),
)  # fmt: skip
MODEL = load_model("qwen2.5-0.5b")


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(
    kind=st.sampled_from(sorted(READERS)),
    values=st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=12),
    machine=st.sampled_from(["1xA100-80GB", "8xH100"]),
)
def test_every_recipe_ends_in_a_fit_or_a_sentence(kind, values, machine):
    job = TrainingJob(model=MODEL, machine=parse_machine(machine), engine="hf_trainer")
    try:
        result = fit_training(with_recipe(kind, Fields(values, "recipe.yaml"), job), advise=False)
    except UllageError as error:
        assert "\n" not in str(error) and str(error)
    else:
        assert result.exit_code in (0, 3, 4)
