"""What the recipes of the Trainer family say, in one form, and how it is laid over a job."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from ullage.errors import InputError, LayoutError
from ullage.frozen import Frozen
from ullage.i18n import _
from ullage.read.fsdp_words import FsdpWords, lay_fsdp
from ullage.read.jsonfile import is_file
from ullage.read.recipe_fields import Fields
from ullage.spec.model import Model
from ullage.spec.rlhf import Rlhf
from ullage.spec.training import Evaluation, Lora, Recompute, TrainingJob, TrainingParallel

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
    "ao_adamw_4bit": ("adamw_4bit", None),
    "paged_lion_32bit": ("paged_lion", None),
    # torchao@0.14:optim/adam.py:AdamW8bit, AdamWFp8 (blocks of 256, an fp32 scale each)
    "adamw_torch_8bit": ("adamw_8bit", None),
    "ao_adamw_8bit": ("adamw_8bit", None),
    "ao_adamw_fp8": ("adamw_8bit", None),
    "ademamix": ("ademamix", None),
    "ademamix_8bit": ("ademamix_8bit", None),
    "paged_ademamix_32bit": ("paged_ademamix", None),
    "paged_ademamix_8bit": ("paged_ademamix_8bit", None),
    "adagrad": ("adagrad", None),
    "rmsprop": ("rmsprop", None),
    "rmsprop_bnb": ("rmsprop", None),
    "rmsprop_bnb_32bit": ("rmsprop", None),
    "rmsprop_bnb_8bit": ("rmsprop_8bit", None),
    "schedule_free_adamw": ("schedule_free_adamw", None),
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
    "flash_attention_4": "flash",
    "kernels-community/flash-attn2": "flash",
    "kernels-community/flash-attn3": "flash",
    "kernels-community/vllm-flash-attn3": "flash",
    "flex_attention": "flash",
    "xformers": "flash",
}
#: Kernels of which it is assumed that they keep what FlashAttention keeps: queries, keys, values, output, and one fp32
#: value a row. Source: torch@2.13.0:torch/_higher_order_ops/flex_attention.py:FlexAttentionAutogradOp.forward
#: (query, key, value, out, logsumexp); xformers@0.0.30:ops/fmha/__init__.py:_fMHA.forward.
LIKE_FLASH = ("flex_attention", "xformers", "kernels-community/vllm-flash-attn3")
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
        program: whose rules hold beside the Trainer's, such as ``axolotl``; flags: as in a job.
        precision: a recipe of :data:`ullage.read.training_words.RECIPES`.
        deepspeed: a file, or the configuration itself; accelerate: what the program is launched with.
        rlhf: preference or reinforcement training.
        evaluation: between steps.
        context: ranks that share a sequence.
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
    program: str = ""
    flags: tuple[tuple[str, str], ...] = ()
    deepspeed: Any = None
    accelerate: dict[str, Any] | None = None
    fsdp: FsdpWords | None = None
    activation_offload: bool = False
    evaluation: Evaluation | None = None
    context: int = 1
    said: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()


def optimizer_of(fields: Fields, key: str, default: str) -> tuple[str, Literal["fused", "foreach", "for_loop"] | None]:
    """Return the optimizer and its implementation by the Trainer's name.

    Raises:
        InputError: an optimizer whose states are not known here.
    """
    name = (fields.word(key) or default).lower()
    name = name.removeprefix("optimizernames.")
    if name not in OPTIMIZERS:
        raise InputError(
            _("{key}: the states of {name} are not known").format(key=key, name=name[:40]),
            where=fields.where,
            remedy=_("known are {known}").format(known=", ".join(OPTIMIZERS)),
        )
    return OPTIMIZERS[name]


def attention_of(fields: Fields, key: str = "attn_implementation") -> tuple[str | None, tuple[str, ...]]:
    """Return which kernel runs, and what is taken for granted of it.

    Raises:
        InputError: a kernel of which it is not known what it keeps.
    """
    name = fields.word(key)
    if name is None:
        return None, ()
    kernel = name.lower().split("@")[0].removeprefix("paged|")
    if kernel not in ATTENTION:
        raise InputError(
            _("{key}: what {name} keeps is not known").format(key=key, name=name[:60]),
            where=fields.where,
            remedy=_("known are {known}").format(known=", ".join(ATTENTION)),
        )
    like = (_("{name} keeps what FlashAttention keeps").format(name=name[:60]),) if kernel in LIKE_FLASH else ()
    return ATTENTION[kernel], like


def evaluation(fields: Fields, *, spares_logits: bool = False) -> Evaluation | None:
    """Return the Trainer's evaluation between steps, or at the end of training (``do_eval``).

    Source: transformers@5.23.0:training_args.py:TrainingArguments (8 sequences a device by default).
    """
    when = fields.word("eval_strategy") or fields.word("evaluation_strategy") or "no"
    batch = fields.count("per_device_eval_batch_size") or 8
    if when.lower() == "no" and not fields.flag("do_eval"):
        return None
    return Evaluation(batch_size=batch, spares_logits=spares_logits)


def parse_targets(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return LoRA's targets; ``all`` and ``all-linear`` are every linear layer."""
    return ("all-linear",) if not names or names[0] in ("all", "all-linear") else names


def lay_over(job: TrainingJob, words: RecipeWords, path: Path) -> TrainingJob:
    """Lay a recipe over a job.

    Raises:
        InputError: an unusable DeepSpeed configuration, or a layout that no rule here follows.
    """
    from ullage.read.training_words import RECIPES

    base = words.base_quantization or _stored(job, words)
    said = _said(job, words, base)
    precision = RECIPES[words.precision]
    if precision.compute != words.compute and words.precision != "fp32":
        precision = replace(precision, compute=words.compute)
    found = replace(
        job,
        engine="hf_trainer",
        engine_version=f"{words.program} {job.engine_version}".strip(),
        parallel=_parallel(job, words.context, path),
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
        method=_method(words, base),
        lora=_chosen(job.model, words.lora, said),
        rlhf=words.rlhf or job.rlhf,
        base_quantization=base,
        offload=(("activations", "cpu"),) if words.activation_offload else (),
        flags=words.flags,
        assumed=tuple(said),
    )
    return _evaluated(_spread(found, words, path), words)


def _said(job: TrainingJob, words: RecipeWords, base: str | None) -> list[str]:
    """Return what is taken for granted of the recipe and of the model under it."""
    said = list(words.said)
    if job.model.quantization is not None and base is None:
        name = job.model.quantization.method
        said.append(_("the checkpoint's weights in {name} are made 16-bit for training").format(name=name[:40]))
    if job.model.towers:
        said.append(_("text alone: the towers and what they make of images or sound are not counted"))
    if words.unknown:
        said.append(_("keys not known, taken as without memory: {keys}").format(keys=", ".join(words.unknown)[:400]))
    return said


def _spread(job: TrainingJob, words: RecipeWords, path: Path) -> TrainingJob:
    """Return the job as DeepSpeed, Accelerate or FSDP spreads it; the recipe's own DeepSpeed file wins."""
    if words.deepspeed is not None:
        return _with_deepspeed(job, words.deepspeed, path)
    if words.accelerate is not None:
        from ullage.read.accelerate_parts import under_accelerate

        job = under_accelerate(job, words.accelerate, path)
    alone = job.parallel.fsdp is None and not job.parallel.zero_stage
    return lay_fsdp(job, words.fsdp) if words.fsdp is not None and alone else job


def _evaluated(job: TrainingJob, words: RecipeWords) -> TrainingJob:
    """Return the job with its evaluation where the rules follow it, and say so where they do not."""
    from ullage.engines.follows import FOLLOWS

    if words.evaluation is None:
        return job
    if job.rlhf is None and FOLLOWS[job.engine].evaluation:
        return replace(job, evaluation=job.evaluation or words.evaluation)
    said = _("evaluation, {count} sequences at a time, is not counted").format(count=words.evaluation.batch_size)
    return replace(job, assumed=(*job.assumed, said))


def _parallel(job: TrainingJob, context: int, path: Path) -> TrainingParallel:
    world = job.machine.num_gpus
    if world % context:
        raise LayoutError(_("the degrees do not make up {world} GPUs").format(world=world), where=str(path)[:80])
    layout = replace(job.parallel, zero_stage=0, fsdp=None)
    return replace(layout, data_parallel_size=world // context, context_parallel_size=context)


def _stored(job: TrainingJob, words: RecipeWords) -> str | None:
    """Return how the checkpoint itself is quantised, where the frozen base stays so.

    Raises:
        InputError: a format of which it is not known how it is trained on.
    """
    stored = job.model.quantization.method if job.model.quantization is not None else None
    if stored is None or words.lora is None:
        return None
    kinds = {"gptq": "gptq", "bitsandbytes": "nf4", "bnb": "nf4", "nf4": "nf4", "fp8": "", "mxfp4": ""}
    kind = next((kinds[name] for name in kinds if stored.lower().startswith(name)), None)
    if kind is None:
        raise InputError(
            _("adapters on a base in {name} are not followed").format(name=stored[:40]),
            remedy=_("name the model in 16 bits, or in gptq"),
        )
    return kind or None


def _chosen(model: Model, lora: Lora | None, said: list[str]) -> Lora | None:
    """Return the adapters with PEFT's own choice of layers where none are named: queries and values for most models.

    Source: peft@0.21.2:utils/constants.py:TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.
    """
    from ullage.account.parameters import layer_parameters

    if lora is None or lora.kind != "lora" or lora.targets:
        return lora
    names = {one.name for layer in model.layers for one in layer_parameters(layer, model.hidden_size)}
    choices = (("q_proj", "v_proj"), ("query_key_value",), ("c_attn",), ("Wqkv",))
    found = [targets for targets in choices if any(f".{targets[0]}." in f".{name}" for name in names)]
    targets = found[0] if found else choices[0]
    said.append(_("LoRA on {names}, PEFT's choice").format(names=", ".join(targets)))
    return replace(lora, targets=targets)


def _method(words: RecipeWords, base: str | None) -> str:
    if words.lora is None:
        return "full"
    if words.lora.kind != "lora":
        return words.lora.kind
    return "qlora" if base else "lora"


def _with_deepspeed(job: TrainingJob, config: Any, path: Path) -> TrainingJob:
    """Lay the DeepSpeed part over: a file beside the recipe or where it runs, or the configuration itself."""
    from ullage.read.training_parts import own_precision, with_deepspeed, with_deepspeed_values

    if job.base_quantization is None:  # a quantised base is spread by the Trainer's own rules
        job = replace(job, engine="deepspeed", precision=own_precision(job.precision.compute))
    if isinstance(config, dict):
        return with_deepspeed_values(job, config, where=f"{path}: deepspeed")
    if not isinstance(config, str) or "\0" in config:
        raise InputError(_("deepspeed is neither a file nor a configuration"), where=str(path))
    for place in (path.parent / config, Path(config)):
        if is_file(place):
            return with_deepspeed(job, place)
    raise InputError(_("the DeepSpeed file {name} is not there").format(name=config[:200]), where=f"{path}: deepspeed")
