"""How a change of training is typed in the words of each framework.

Sources: Megatron-LM@d98e8a6:megatron/training/arguments.py; torchtitan@v0.2:torchtitan/config/job_config.py;
transformers@5.23:src/transformers/training_args.py; unsloth@015bdef0:unsloth/models/llama.py; DeepSpeed's configuration
page; torch@2.13:torch/distributed.
"""

from __future__ import annotations

from ullage.spec.training import TrainingJob

_PEFT = "LoraConfig(r=16, target_modules='all-linear')"
_TRAINER = {
    "attention": "attn_implementation: flash_attention_2",
    "loss.liger": "use_liger_kernel: true",
    "compile": "torch_compile: true",
    "optimizer_impl": "optim: adamw_torch_fused",
    "micro_batch": "per_device_train_batch_size: {micro}, gradient_accumulation_steps: {passes}",
    "recompute.full": "gradient_checkpointing: true",
    "optimizer": "optim: adamw_8bit",
    "zero.1": '"zero_optimization": {{"stage": 1}}',
    "zero.2": '"zero_optimization": {{"stage": 2}}',
    "zero.3": '"zero_optimization": {{"stage": 3}}',
    "fsdp": "fsdp: full_shard auto_wrap",
    "lora": _PEFT,
    "base_quantization": "load_in_4bit: true, bnb_4bit_quant_type: nf4",
    "seq_len": "max_length: {half}",
    "evaluation": "per_device_eval_batch_size: {batch}",
    "evaluation.kept": "eval_accumulation_steps: 1",
}
_FSDP = {
    "attention": "torch.nn.functional.scaled_dot_product_attention",
    "compile": "torch.compile(model)",
    "optimizer_impl": "AdamW(fused=True)",
    "micro_batch": "DataLoader(batch_size={micro}), {passes} passes a step",
    "recompute.full": "apply_activation_checkpointing(model)",
    "recompute.every": "checkpoint_wrapper on every other layer",
    "fsdp": "fully_shard(model, reshard_after_forward=True)",
    "offload.params": "CPUOffloadPolicy()",
    "optimizer": "torchao.optim.AdamW8bit",
    "lora": _PEFT,
}
_WORDS: dict[str, dict[str, str]] = {
    "megatron": {
        "attention": "--attention-backend flash",
        "loss.fused": "--cross-entropy-loss-fusion",
        "sequence_parallel": "--sequence-parallel",
        "zero.1": "--use-distributed-optimizer",
        "micro_batch": "--micro-batch-size {micro}",
        "recompute.selective": "--recompute-activations",
        "recompute.block": "--recompute-granularity full --recompute-method block --recompute-num-layers {count}",
        "recompute.full": "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
        "offload.optimizer": "--optimizer-cpu-offload --optimizer-offload-fraction 1.0",
        "tp": "--tensor-model-parallel-size {size} --sequence-parallel",
        "pp": "--pipeline-model-parallel-size {size}",
        "cp": "--context-parallel-size {size}",
        "ep": "--expert-model-parallel-size {size}",
        "seq_len": "--seq-length {half}",
    },
    "torchtitan": {
        "compile": "--compile.enable",
        "micro_batch": "--training.local_batch_size {micro}",
        "recompute.selective": "--activation_checkpoint.mode selective",
        "recompute.every": "--activation_checkpoint.mode selective --activation_checkpoint.selective_ac_option 2",
        "recompute.full": "--activation_checkpoint.mode full",
        "tp": "--parallelism.tensor_parallel_degree {size}",
        "pp": "--parallelism.pipeline_parallel_degree {size}",
        "cp": "--parallelism.context_parallel_degree {size}",
        "ep": "--parallelism.expert_parallel_degree {size}",
        "offload.params": "--training.enable_cpu_offload",
        "seq_len": "--training.seq_len {half}",
        "optimizer_impl": "--optimizer.implementation fused",
    },
    "deepspeed": {
        **_TRAINER,
        "micro_batch": '"train_micro_batch_size_per_gpu": {micro}, "gradient_accumulation_steps": {passes}',
        "offload.optimizer": '"offload_optimizer": {{"device": "cpu"}}',
        "offload.params": '"offload_param": {{"device": "cpu"}}',
    },
    "hf_trainer": _TRAINER,
    "single": {**_TRAINER, **_FSDP, "recompute.full": "model.gradient_checkpointing_enable()"},
    "ddp": {**_TRAINER, "recompute.full": "model.gradient_checkpointing_enable()"},
    "unsloth": {
        "micro_batch": _TRAINER["micro_batch"],
        "optimizer": _TRAINER["optimizer"],
        "optimizer_impl": _TRAINER["optimizer_impl"],
        "recompute.full": "use_gradient_checkpointing=True",
        "base_quantization": "load_in_4bit=True",
        "seq_len": "max_seq_length={half}",
    },
    "fsdp1": {**_FSDP, "fsdp": "ShardingStrategy.FULL_SHARD", "offload.params": "CPUOffload(offload_params=True)"},
    "fsdp2": _FSDP,
    "torchtune": {
        "micro_batch": "batch_size={micro} gradient_accumulation_steps={passes}",
        "recompute.full": "enable_activation_checkpointing=True",
        "loss.chunked": "loss=torchtune.modules.loss.LinearCrossEntropyLoss",
        "optimizer": "optimizer=bitsandbytes.optim.AdamW8bit",
        "compile": "compile=True",
        "optimizer_impl": "optimizer.fused=True",
        "offload.params": "fsdp_cpu_offload=True",
        "seq_len": "tokenizer.max_seq_len={half}",
    },
    "litgpt": {
        "micro_batch": "--train.micro_batch_size {micro}",
        "seq_len": "--train.max_seq_length {half}",
        "base_quantization": "--quantize bnb.nf4",
    },
}


def typed(job: TrainingJob, key: str, **values: int) -> str:
    """Return what to type for a change, empty where the framework has no one line for it."""
    words = _WORDS.get(job.engine, {}).get(key, "")
    return words.format(**values) if words else ""
