"""Names of axolotl's settings: those that cost no memory, those that are not followed, and its plugins.

Source: axolotl@0.19.0:axolotl/utils/schemas/.
"""

from __future__ import annotations

HARMLESS = (
    "base_model", "base_model_config", "model_type", "tokenizer_type", "sequence_len", "pad_to_sequence_len", "strict",
    "lora_fan_in_fan_out", "lora_model_dir", "group_by_length", "train_on_inputs", "lr_scheduler", "plugins", "tokens",
    "datasets", "rl", "special_tokens", "sample_packing_eff_est", "eval_sample_packing", "revision_of_model",
    "liger_layer_norm", "liger_rms_norm_gated", "liger_use_token_scaling", "liger_kernel_impl", "bnb_config_kwargs",
    "experimental_skip_move_to_device", "resize_token_embeddings_to_32x", "torch_dtype", "bfloat16", "float16",
    "type_of_model", "tf32", "local_rank", "use_tensorboard", "roles_to_train", "hf_use_auth_token", "processor_type",
    "tokenizer_use_fast", "eot_tokens", "base_model_ignore_patterns", "peft_use_rslora", "low_cpu_mem_usage",
    "qlora_sharded_model_loading", "lora_on_cpu", "val_set_size", "heads_k_stride", "ring_attn_func", "ddp",
    "push_dataset_to_hub", "torchdistx_path", "noisy_embedding_alpha", "is_preprocess", "fused_attn_kernel", "seed",
    "sdpa_varlen", "large_head_attention", "flash_optimum", "flash_attn_rms_norm", "model_config", "cls_model_config",
    "overrides_of_model_config", "overrides_of_model_kwargs", "gptq_groupsize", "gptq_model_v1", "merge_lora",
    "eta_min", "vllm", "use_ray", "mean_resizing_embeddings", "device", "pretrain_multipack_attn", "use_wandb",
    "torch_compile_backend", "torch_compile_mode", "flex_attn_compile_kwargs", "excess_length_strategy",
    "fp8_config", "quantization", "center_rewards_coefficient", "num_labels", "trl", "bf16", "reward_model",
    "reinit_weights", "freeze_mm_modules", "gptq_disable_exllama", "full_finetune", "base_model_config",
)  # fmt: skip
PREFIXES = (
    "loss_watchdog", "otel_", "use_otel", "dataset", "eval", "evals_", "saves_", "num_generation", "generation_",
    "generate_samples", "max_packed", "min_sample", "max_prompt", "sample_packing", "pretrain", "streaming",
    "curriculum",
    "shuffle_", "multipack", "is_", "loraplus_", "profiler", "ddp_", "dynamic_checkpoint", "comet_", "ray_",
    "gradio_", "scaling_softmax", "eaft_", "ebft", "total_", "auto_", "added_tokens", "default_system",
)  # fmt: skip
#: Settings that change the memory in ways that are not followed: better refused than left out.
NOT_FOLLOWED = (
    "unsloth_lora_qkv", "unsloth_lora_mlp", "unsloth_lora_o", "unsloth_cross_entropy_loss", "lisa_n_layers", "relora",
    "qat", "fp8", "process_reward_model", "llmcompressor", "layer_offloading", "s2_attention", "unfrozen_parameters",
    "selective_checkpointing", "lora_target_parameters", "peft_layers_to_transform", "peft_layers_pattern",
    "peft_layer_replication", "lora_rank_pattern", "peft_trainable_token_indices", "loftq_bits", "fp32_norms",
    "ple_cpu_offload", "diffusion", "hatchery", "use_onebitllms", "nvfp4_merge_aware", "deepcompile", "use_pose",
    "batch_flattening", "use_eaft", "device_map", "dpo_use_liger_kernel", "lora_exclude_modules", "large_lm_head",
)  # fmt: skip
#: Plugins whose effect is read from their settings, or that have none on the memory, by a part of their names.
PLUGINS = ("liger", "cut_cross_entropy", "kernels", "lm_eval", "swanlab", "expert_parallel", "nemo_gym")
