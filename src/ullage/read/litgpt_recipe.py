"""A configuration of litgpt (YAML, ``litgpt finetune_lora --config``) → what it says of a job.

Source: litgpt@26857050:config_hub, litgpt/finetune/lora.py:setup, litgpt/finetune/full.py:setup,
    litgpt/args.py:TrainArgs.
"""

from __future__ import annotations

from pathlib import Path

from ullage.errors import InputError
from ullage.i18n import _
from ullage.read.recipe_fields import Fields
from ullage.read.tuner_words import TunerWords, adapters, named_differently
from ullage.spec.training import Recompute

#: What ``lora_NAME: true`` gives adapters to.
_PARTS = ("query", "key", "value", "projection", "mlp", "head")
_OPTIMIZERS = {
    "torch.optim.AdamW": "adamw",
    "AdamW": "adamw",
    "torch.optim.Adam": "adam",
    "torch.optim.SGD": "sgd",
    "bitsandbytes.optim.PagedAdamW": "paged_adamw",
}
_QUANTISED = ("nf4", "nf4-dq", "fp4", "fp4-dq")
_HARMLESS = frozenset(
    """
    checkpoint_dir out_dir devices num_nodes data eval logger_name seed lora_alpha access_token resume
    initial_checkpoint_dir tokenizer_dir initial_validation final_validation log
    """.split()  # noqa: SIM905
)


def litgpt_recipe(fields: Fields, num_gpus: int) -> TunerWords:
    """Read a configuration of full or LoRA fine-tuning, or of pretraining, for ``num_gpus``.

    Raises:
        InputError: another number of GPUs, or a setting that the rules do not follow.
    """
    _check_devices(fields, num_gpus)
    train = fields.section("train") or Fields({}, fields.where)
    micro = train.count("micro_batch_size") or 1
    batch = train.count("global_batch_size") or micro * num_gpus
    lora = None
    if "lora_r" in fields.values:
        targets = [name for name in _PARTS if fields.flag(f"lora_{name}", default=name in ("query", "value"))]
        lora = adapters(fields, rank="lora_r", dropout="lora_dropout", targets=targets)
    quantised = _quantised(fields)
    if quantised is not None and lora is None:
        raise InputError(_("a base in {name} cannot be trained itself").format(name=quantised), where=fields.where)
    return TunerWords(
        model=_named(fields),
        micro_batch_size=micro,
        grad_accum=max(1, batch // (micro * num_gpus)),
        seq_len=train.count("max_seq_length"),
        optimizer=_optimizer(fields),
        recompute=Recompute(kind="none", given=False),
        loss="chunked",
        lora=lora,
        method="full" if lora is None else "qlora" if quantised else "lora",
        base_quantization=quantised,
        said=named_differently(fields, _HARMLESS),
    )


def _check_devices(fields: Fields, num_gpus: int) -> None:
    devices, nodes = fields.raw("devices"), fields.count("num_nodes") or 1
    if isinstance(devices, int) and not isinstance(devices, bool) and devices * nodes != num_gpus:
        raise InputError(
            _("devices and num_nodes make {count} GPUs, and the machine has {world}").format(
                count=devices * nodes, world=num_gpus
            ),
            where=fields.where,
            remedy=_("give the machine of the file with --on"),
        )
    precision = fields.word("precision") or "bf16-true"
    if precision != "bf16-true":
        raise InputError(
            _("training in {dtype} is not followed").format(dtype=precision[:20]),
            where=f"{fields.where}: precision",
            remedy=_("write bf16-true"),
        )
    if fields.raw("model_config") is not None:
        raise InputError(
            _("a model of the file's own is not read"),
            where=f"{fields.where}: model_config",
            remedy=_("name a config.json before --from"),
        )


def _named(fields: Fields) -> str | None:
    """Return the model: the last two folders of its checkpoint, as ``litgpt download`` lays them out, or its name."""
    folder = fields.word("checkpoint_dir")
    if folder:
        parts = Path(folder).parts[-2:]
        return "/".join(part for part in parts if part != "checkpoints")
    return fields.word("model_name")


def _quantised(fields: Fields) -> str | None:
    text = fields.word("quantize")
    if text is None:
        return None
    name = text.removeprefix("bnb.")
    if name not in (*_QUANTISED, "int8-training"):
        raise fields.wrong("quantize", _("one of {known}").format(known=", ".join(_QUANTISED)))
    return "int8" if name == "int8-training" else name


def _optimizer(fields: Fields) -> str:
    value = fields.raw("optimizer")
    name = value.get("class_path") if isinstance(value, dict) else value
    if name is None:
        return "adamw"
    if not isinstance(name, str) or name not in _OPTIMIZERS:
        raise InputError(
            _("the optimizer {name} is not followed").format(name=str(name)[:60]),
            where=f"{fields.where}: optimizer",
            remedy=_("known are {known}").format(known=", ".join(_OPTIMIZERS)),
        )
    return _OPTIMIZERS[name]
