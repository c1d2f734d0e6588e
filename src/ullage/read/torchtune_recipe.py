"""A recipe of torchtune (YAML) → what it says of a job.

Source: torchtune@bd2a0fc:recipes/configs, recipes/full_finetune_distributed.py, recipes/lora_finetune_distributed.py.
"""

from __future__ import annotations

from pathlib import Path

from ullage.errors import InputError
from ullage.i18n import _
from ullage.read.recipe_fields import Fields
from ullage.read.tuner_words import TunerWords, adapters, named_differently, unfollowed
from ullage.spec.training import Lora, Recompute

#: Optimizers by component: name, and whether PyTorch's fused form is a setting.
_OPTIMIZERS = {
    "torch.optim.AdamW": "adamw",
    "torch.optim.Adam": "adam",
    "torch.optim.SGD": "sgd",
    "bitsandbytes.optim.PagedAdamW": "paged_adamw",
    "bitsandbytes.optim.PagedAdamW8bit": "paged_adamw_8bit",
    "bitsandbytes.optim.AdamW8bit": "adamw_8bit",
    "torchao.optim.AdamW8bit": "adamw_8bit",
    "torchao.optim.AdamW4bit": "adamw_4bit",
}
#: Losses by the last word of their component.
_LOSSES = {
    "LinearCrossEntropyLoss": "chunked",
    "CEWithChunkedOutputLoss": "chunked",
    "CrossEntropyLoss": "plain",
}
_HARMLESS = frozenset(
    """
    tokenizer seed output_dir device checkpointer log_level resume_from_checkpoint metric_logger log_peak_memory_stats
    log_every_n_steps shuffle dataset epochs max_steps_per_epoch profiler clip_grad_norm lr_scheduler
    save_adapter_weights_only run_val_every_n_steps dataset_val batch_size_val custom_sharded_layers collate_fn
    low_cpu_ram save_every_n_epochs use_distributed_state_dict enable_async_checkpointing data_parallel_shard_dim
    keep_last_n_checkpoints save_every_n_steps dataset_train base_model_path name enable_activation_offloading_streams
    """.split()  # noqa: SIM905
)


def torchtune_recipe(fields: Fields) -> TunerWords:
    """Read a recipe of supervised fine-tuning.

    Raises:
        InputError: another kind of recipe, or a setting that the rules do not follow.
    """
    _check_kind(fields)
    model = fields.section("model")
    assert model is not None
    component = model.word("_component_") or ""
    lora = _adapters(model, component)
    quantised = component.rpartition(".")[2].startswith("qlora_") or model.flag("quantize_base")
    optimizer, fused, said = _optimizer(fields)
    tokenizer = fields.section("tokenizer")
    return TunerWords(
        model=_named(fields, component),
        micro_batch_size=fields.count("batch_size") or 1,
        grad_accum=fields.count("gradient_accumulation_steps") or 1,
        seq_len=tokenizer.count("max_seq_len") if tokenizer is not None else None,
        optimizer=optimizer,
        optimizer_impl=fused,
        recompute=Recompute(kind="full" if fields.flag("enable_activation_checkpointing") else "none"),
        compile=fields.flag("compile"),
        loss=_loss(fields),
        lora=lora,
        method="full" if lora is None else "qlora" if quantised else "dora" if lora.dora else "lora",
        base_quantization="nf4" if quantised else None,
        offload=_offload(fields),
        said=(*said, *named_differently(fields, _HARMLESS)),
    )


def _check_kind(fields: Fields) -> None:
    """Refuse recipes that do not train, or train otherwise."""
    unfollowed(
        fields,
        {
            "teacher_model": _("a teacher beside the model, which is not followed"),
            "policy_model": _("reinforcement learning, which is not followed under torchtune"),
            "ppo_epochs": _("reinforcement learning, which is not followed under torchtune"),
            "grpo_samples": _("reinforcement learning, which is not followed under torchtune"),
            "orchestration": _("reinforcement learning, which is not followed under torchtune"),
            "ac_option": _("recompute of some layers, which is not followed"),
        },
    )
    for key in ("model", "optimizer", "loss"):
        if fields.raw(key) is None:
            raise InputError(_("the file trains nothing: it has no {key}").format(key=key), where=fields.where)
    if fields.raw("quantizer") is not None:
        raise InputError(_("quantisation-aware training is not followed"), where=f"{fields.where}: quantizer")
    if (fields.word("dtype") or "bf16") != "bf16":
        raise InputError(
            _("training in {dtype} is not followed").format(dtype=str(fields.raw("dtype"))[:20]),
            where=f"{fields.where}: dtype",
            remedy=_("write bf16"),
        )
    if (fields.count("tensor_parallel_dim") or 1) > 1:
        raise InputError(
            _("ullage's rules of {engine} do not follow {what}").format(
                engine="torchtune", what=_("tensor parallelism")
            ),
            where=f"{fields.where}: tensor_parallel_dim",
        )
    fields.raw("tensor_parallel_plan")
    if (fields.count("data_parallel_replicate_dim") or 1) > 1:
        raise InputError(
            _("replicas of sharded groups are not followed"), where=f"{fields.where}: data_parallel_replicate_dim"
        )


def _named(fields: Fields, component: str) -> str | None:
    """Return the model: the folder of its checkpoint, which torchtune's own recipes name as the hub does.

    Raises:
        InputError: a model that is not one of text alone.
    """
    if any(word in component for word in ("vision", "clip", "llama4")):
        raise InputError(_("models with a vision encoder are not followed"), where=f"{fields.where}: model")
    checkpointer = fields.section("checkpointer")
    folder = checkpointer.word("checkpoint_dir") if checkpointer is not None else None
    name = Path(folder or "").name
    return name if name and "$" not in name else None


def _adapters(model: Fields, component: str) -> Lora | None:
    """Return the adapters of a component such as ``lora_llama3_8b``."""
    if not component.rpartition(".")[2].startswith(("lora_", "qlora_", "dora_", "qdora_")):
        return None
    targets = list(model.words("lora_attn_modules"))
    targets += ["mlp"] if model.flag("apply_lora_to_mlp") else []
    targets += ["output"] if model.flag("apply_lora_to_output") else []
    dora = model.flag("use_dora") or component.rpartition(".")[2].startswith(("dora_", "qdora_"))
    return adapters(model, rank="lora_rank", dropout="lora_dropout", targets=targets, dora=dora)


def _optimizer(fields: Fields) -> tuple[str, str | None, tuple[str, ...]]:
    """Return the optimizer, how PyTorch runs it, and what was assumed.

    Raises:
        InputError: one that is not known.
    """
    section = fields.section("optimizer")
    assert section is not None
    component = section.word("_component_") or ""
    if component not in _OPTIMIZERS:
        raise InputError(
            _("the optimizer {name} is not followed").format(name=component[:60]),
            where=f"{fields.where}: optimizer",
            remedy=_("known are {known}").format(known=", ".join(_OPTIMIZERS)),
        )
    name = _OPTIMIZERS[component]
    plain = component.startswith("torch.optim")
    impl = ("fused" if section.flag("fused") else "foreach") if plain else None
    inside, said = fields.flag("optimizer_in_bwd"), []
    if inside != name.startswith("paged"):
        said.append(
            _("optimizer_in_bwd is followed with paged optimizers only: gradients are counted whole")
            if inside
            else _("a paged optimizer is taken to step in the backward pass on one device")
        )
    return name, impl, tuple(said)


def _loss(fields: Fields) -> str:
    section = fields.section("loss")
    assert section is not None
    name = (section.word("_component_") or "").rpartition(".")[2]
    if name not in _LOSSES:
        raise InputError(
            _("the loss {name} is not followed").format(name=name[:60]),
            where=f"{fields.where}: loss",
            remedy=_("known are {known}").format(known=", ".join(_LOSSES)),
        )
    return _LOSSES[name]


def _offload(fields: Fields) -> tuple[tuple[str, str], ...]:
    found = [("activations", "cpu")] if fields.flag("enable_activation_offloading") else []
    if fields.flag("fsdp_cpu_offload"):
        found += [("params", "cpu"), ("optimizer", "cpu")]
    return tuple(found)
