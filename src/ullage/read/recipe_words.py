"""What the recipes of the Trainer family say, in one form, and how it is laid over a job."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from ullage.errors import InputError
from ullage.frozen import Frozen
from ullage.i18n import _
from ullage.read.recipe_fields import Fields
from ullage.spec.rlhf import Rlhf
from ullage.spec.training import Lora, Recompute, TrainingJob

#: Names of ``optim`` -> (optimizer, implementation). Source: transformers@5.23.0:training_args.py:OptimizerNames.
OPTIMIZERS: dict[str, tuple[str, Literal["fused", "foreach", "for_loop"] | None]] = {
    "adamw_torch": ("adamw", "foreach"),
    "adamw_torch_fused": ("adamw", "fused"),
    "adamw_torch_xla": ("adamw", None),
    "adamw_hf": ("adamw", "for_loop"),
    "adamw_8bit": ("adamw_8bit", None),
    "adamw_bnb_8bit": ("adamw_8bit", None),
    "paged_adamw_32bit": ("paged_adamw", None),
    "paged_adamw_8bit": ("paged_adamw_8bit", None),
    "adamw_torch_4bit": ("adamw_4bit", None),
    "adafactor": ("adafactor", None),
    "sgd": ("sgd", None),
    "lion_32bit": ("lion", None),
    "lion_8bit": ("lion_8bit", None),
    "paged_lion_8bit": ("paged_lion_8bit", None),
    "muon": ("muon", None),
}
#: Names of ``attn_implementation``. Source: transformers@5.23.0:modeling_utils.py:AttentionInterface.
ATTENTION = {
    "eager": "eager",
    "sdpa": "sdpa",
    "flash_attention_2": "flash",
    "flash_attention_3": "flash",
    "kernels-community/flash-attn2": "flash",
    "kernels-community/flash-attn3": "flash",
}
#: Settings that cost no memory on the device, by how they begin. Source: transformers@5.23.0:training_args.py.
HARMLESS_PREFIXES = (
    "adam_", "bench_", "comet_", "data", "ddp_", "debug", "do_", "early_stopping", "eval", "hub_", "include_", "jit_",
    "label", "load_best", "log", "lr_", "max_grad_norm", "max_steps", "mlflow_", "num_train_epochs", "num_epochs",
    "optim_", "output", "overwrite_", "past_index", "batch_eval", "enable_jit", "train_sampling", "plot_", "predict",
    "preprocessing", "project", "push_to_hub",
    "ray_", "remove_", "report_to", "restore_", "resume_", "run_name", "sav", "seed", "skip_", "swanlab_", "template",
    "tokeniz", "trackio", "train_on", "trust_remote", "use_cpu", "use_fast", "use_swanlab", "val_", "wandb_", "warmup",
    "weight_decay", "learning_rate", "metric", "greater_is_better", "ignore_data_skip", "local_rank", "accelerator_",
    "average_tokens", "neftune", "chat_template", "special_tokens", "test_", "gc_", "tf32", "cosine_",
    "full_determinism", "group_by_length", "disable_tqdm", "lora_alpha", "use_rslora", "streaming",
    "mix_strategy", "media_dir",
)  # fmt: skip


class RecipeWords(Frozen):
    """What a recipe says; None where it says nothing.

    Attributes:
        precision: a recipe of :data:`ullage.read.training_words.RECIPES`.
        deepspeed: a file, or the configuration itself. fsdp: sharded over all ranks.
        rlhf: preference or reinforcement training.
        said: sentences for the user on what was taken for granted; unknown: settings not understood.
    """

    micro_batch_size: int
    grad_accum: int
    seq_len: int | None = None
    optimizer: str = "adamw"
    optimizer_impl: Literal["fused", "foreach", "for_loop"] | None = None
    recompute: bool = False
    recompute_every: int = 1
    attention: str | None = None
    loss: str | None = None
    compile: bool = False
    packing: bool = False
    precision: str = "bf16"
    compute: str = "bfloat16"
    lora: Lora | None = None
    rlhf: Rlhf | None = None
    base_quantization: str | None = None
    deepspeed: Any = None
    fsdp: bool = False
    fsdp_offload: bool = False
    activation_offload: bool = False
    said: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()


def optimizer_of(fields: Fields, key: str, default: str) -> tuple[str, Literal["fused", "foreach", "for_loop"] | None]:
    """Return the optimizer and its implementation by the Trainer's name."""
    found: tuple[str, Literal["fused", "foreach", "for_loop"] | None] | None = fields.choice(key, OPTIMIZERS)
    return found or OPTIMIZERS[default]


def parse_targets(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return LoRA's targets; ``all`` and ``all-linear`` are every linear layer."""
    return ("all-linear",) if not names or names[0] in ("all", "all-linear") else names


def lay_over(job: TrainingJob, words: RecipeWords, path: Path) -> TrainingJob:
    """Lay a recipe over a job.

    Raises:
        InputError: an unusable DeepSpeed configuration, or a layout that no rule here follows.
    """
    from ullage.read.training_words import RECIPES

    said = list(words.said)
    if words.unknown:
        said.append(_("keys not known, taken as without memory: {keys}").format(keys=", ".join(words.unknown)[:400]))
    precision = RECIPES[words.precision]
    if precision.compute != words.compute and words.precision != "fp32":
        precision = replace(precision, compute=words.compute)
    parallel = replace(job.parallel, zero_stage=0, fsdp="full_shard" if words.fsdp else None)
    offload = [("activations", "cpu")] if words.activation_offload else []
    offload += [("params", "cpu"), ("optimizer", "cpu")] if words.fsdp_offload else []
    found = replace(
        job,
        engine="hf_trainer",
        parallel=parallel,
        precision=precision,
        optimizer=words.optimizer,
        optimizer_impl=words.optimizer_impl,
        micro_batch_size=words.micro_batch_size,
        seq_len=words.seq_len or job.seq_len,
        grad_accum=words.grad_accum,
        packing=words.packing,
        recompute=Recompute(kind="full", every=words.recompute_every) if words.recompute else Recompute(),
        attention=words.attention,  # type: ignore[arg-type]
        loss=words.loss,  # type: ignore[arg-type]
        compile=words.compile,
        method=_method(words),
        lora=words.lora,
        rlhf=words.rlhf or job.rlhf,
        base_quantization=words.base_quantization,
        offload=tuple(offload),
        assumed=tuple(said),
    )
    return _with_deepspeed(found, words.deepspeed, path)


def _method(words: RecipeWords) -> str:
    if words.lora is None:
        return "full"
    if words.lora.kind != "lora":
        return words.lora.kind
    return "qlora" if words.base_quantization else "lora"


def _with_deepspeed(job: TrainingJob, config: Any, path: Path) -> TrainingJob:
    """Lay the DeepSpeed part over: a file beside the recipe or where it runs, or the configuration itself."""
    from ullage.read.training_parts import with_deepspeed, with_deepspeed_values

    if config is None:
        return job
    if job.base_quantization is None:
        job = replace(job, engine="deepspeed")  # a quantised base is spread by the Trainer's own rules
    if isinstance(config, dict):
        return with_deepspeed_values(job, config, where=f"{path}: deepspeed")
    if not isinstance(config, str) or "\0" in config:
        raise InputError(_("deepspeed is neither a file nor a configuration"), where=str(path))
    for place in (path.parent / config, Path(config)):
        if place.is_file():
            return with_deepspeed(job, place)
    raise InputError(_("the DeepSpeed file {name} is not there").format(name=config[:200]), where=f"{path}: deepspeed")
