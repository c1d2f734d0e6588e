"""Models of transformers on meta tensors, from a name or a config.json. Code of a model repository never runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ullage.errors import InputError, MissingExtraError
from ullage.i18n import _
from ullage.trace.job import DTYPES, TraceJob


class Built:
    """A model to trace: the module, its config, the sentences on what was assumed."""

    def __init__(self, model: Any, config: Any, name: str, assumed: list[str]) -> None:
        self.model, self.config, self.name, self.assumed = model, config, name, assumed


def build_model(text: str, job: TraceJob) -> Built:
    """Build the model that ``text`` names on meta tensors.

    Raises:
        InputError: no such model, or transformers cannot build it without code from its repository.
        MissingExtraError: transformers is not installed.
    """
    transformers = _transformers()
    values, count, name = _values(text)
    assumed = []
    if values.pop("quantization_config", None) is not None and job.base is None:
        dtype = DTYPES[job.dtype]
        assumed.append(_("the quantisation of the checkpoint is left out: parameters are {dtype}").format(dtype=dtype))
    for key in ("auto_map", "torch_dtype", "dtype"):
        values.pop(key, None)
    config = _config(transformers, values, name)
    config.use_cache = False
    asked = {"attn_implementation": "eager"} if job.attention == "eager" else {}
    try:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(
                config, dtype=getattr(torch, DTYPES[job.dtype]), **asked
            )
    except Exception as error:  # transformers raises what it likes for a config that it does not take
        raise InputError(
            _("transformers {version} cannot build the model: {why}").format(
                version=transformers.__version__, why=" ".join(str(error).split())[:200]
            ),
            where=name,
        ) from error
    chosen = getattr(model.config, "_attn_implementation", None)
    if chosen == "eager" and job.attention != "eager":
        assumed.append(_("attention: eager, the only one that transformers has for this model by default"))
    if count is not None:
        _check_count(model, count, name)
    return Built(model, config, name, assumed)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise MissingExtraError("transformers", "trace") from None
    transformers.logging.set_verbosity_error()
    return transformers


def _values(text: str) -> tuple[dict[str, Any], int | None, str]:
    """Return (config values, parameters expected or None, name)."""
    from ullage.read.jsonfile import read_json_object
    from ullage.read.model_source import load_model

    path = Path(text).expanduser()
    if text.endswith(".json") or path.is_dir():
        config = path / "config.json" if path.is_dir() else path
        return read_json_object(config), None, str(config)
    from ullage.engines.hf_trainer.states import full_parameters
    from ullage.trace.hf_values import config_values

    model = load_model(text)
    values = config_values(model)
    model_type = _model_type(model.architecture)
    if values is None or model_type is None:
        raise InputError(
            _("the catalog does not hold all that transformers needs to build {name}").format(name=model.name),
            remedy=_("give its config.json instead"),
        )
    return {"model_type": model_type, **values}, full_parameters(model).num_elements, model.name


def _model_type(architecture: str) -> str | None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    return next((model_type for model_type, each in NAMES.items() if each == architecture), None)


def _config(transformers: Any, values: dict[str, Any], name: str) -> Any:
    model_type = values.pop("model_type", None)
    if model_type not in transformers.CONFIG_MAPPING:
        raise InputError(
            _(
                "transformers {version} does not know the model type {model_type!r}, and code of model repositories "
                "never runs"
            ).format(version=transformers.__version__, model_type=str(model_type)[:40]),
            where=name,
            remedy=_("trace your own module with module:function"),
        )
    try:
        kind = transformers.CONFIG_MAPPING[model_type]
        text = getattr(kind, "sub_configs", {}).get("text_config")
        if text is not None and "hidden_size" in values:
            kind = text  # the catalog holds the decoder's values alone
        config = kind(**values)
    except Exception as error:
        raise InputError(" ".join(str(error).split())[:200], where=name) from error
    return getattr(config, "text_config", config)


def _check_count(model: Any, expected: int, name: str) -> None:
    """Refuse a model that is not the catalog's: the values written for it said too little."""
    built = sum({id(each): each.numel() for each in model.parameters()}.values())
    if built != expected:
        raise InputError(
            _("built from the catalog, {name} has {built:,} parameters instead of {expected:,}").format(
                name=name, built=built, expected=expected
            ),
            remedy=_("give its config.json instead"),
        )


def quantise_base(model: Any, job: TraceJob) -> list[str]:
    """Hold the linear layers of a frozen base packed, and prepare it for training; return what was assumed.

    Raises:
        InputError: the base would be trained, or split over ranks, or its experts cannot be prepared.
    """
    from ullage.trace.quantised import prepare_for_training, quantise

    if job.lora is None and not job.inference:
        raise InputError(_("a quantised base is frozen"), remedy=_("give adapters with --lora, or --inference"))
    if job.fsdp or job.ddp:
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
        from ullage.trace.quantised.adapters import adapters_for

        config._register_custom_module(adapters_for(earlier=job.earlier_adapters))
    try:
        with torch.device("meta"):
            return peft.get_peft_model(model, config)
    except (ValueError, TypeError) as error:
        raise InputError(" ".join(str(error).split())[:200], where="--lora") from error
