"""A model of transformers made ready for its step: quantised, recomputing, with adapters."""

from __future__ import annotations

from typing import Any

import torch

from ullage.errors import InputError, MissingExtraError
from ullage.i18n import _
from ullage.trace.job import TraceJob
from ullage.trace.stand_ins.quantised import prepare_for_training, quantise


def prepare(model: Any, job: TraceJob, assumed: list[str] | None = None) -> Any:
    """Set a model of transformers to train or not, its layers to be repeated in backward; give it adapters.

    A quantised base comes first, as where it was loaded so; ``assumed`` takes what is said of it.
    """
    model.train(not job.inference)
    if job.base is not None:
        said = quantise_base(model, job)
        if assumed is not None:
            assumed += said
    if job.recompute == "full" and not job.inference:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": job.reentrant})
    return add_adapters(model, job)


def quantise_base(model: Any, job: TraceJob) -> list[str]:
    """Hold the linear layers of a frozen base packed, and prepare it for training; return what was assumed.

    Raises:
        InputError: the base would be trained, or split over ranks, or its experts cannot be prepared.
    """
    if job.lora is None and not job.inference:
        raise InputError(_("a quantised base is frozen"), remedy=_("give adapters with --lora, or --inference"))
    if job.fsdp or job.ddp or job.tp:
        raise InputError(_("a quantised base on several ranks has no stand-in"))
    prepares = job.base != "gptq" and not job.inference and job.prepare != "none"
    if prepares and any(each.dim() == 3 for each in model.parameters()):
        raise InputError(
            _("experts that are one tensor are not quantised, and preparing the base would make them fp32"),
            remedy=_("give --prepare none"),
        )
    assumed = quantise(model, str(job.base), nested=job.nested, group_size=job.group_size)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if prepares:
        prepare_for_training(model, job.prepare)
        assumed.append(_("norms and biases of the base are fp32, as a trainer prepares it; see --prepare"))
    return assumed


def add_adapters(model: Any, job: TraceJob) -> Any:
    """Wrap a model in adapters as PEFT does.

    Raises:
        MissingExtraError: PEFT is not installed.
        InputError: PEFT refuses.
    """
    if job.lora is None:
        return model
    try:
        import peft
    except ImportError:
        raise MissingExtraError("peft", "trace") from None
    targets = job.lora.targets
    config = peft.LoraConfig(
        r=job.lora.r,
        lora_alpha=job.lora.alpha,
        lora_dropout=job.lora.dropout,
        target_modules=targets[0] if targets == ("all-linear",) else list(targets),
        task_type="CAUSAL_LM",
    )
    if job.base is not None:
        from ullage.trace.stand_ins.quantised.adapters import adapters_for

        config._register_custom_module(adapters_for(earlier=job.earlier_adapters))
    try:
        with torch.device("meta"):
            return peft.get_peft_model(model, config)
    except (ValueError, TypeError) as error:
        raise InputError(" ".join(str(error).split())[:200], where="--lora") from error
