"""Models of transformers on meta tensors, from a name or a config.json. Code of a model repository never runs."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from ullage.engines.hf_trainer.states import full_parameters
from ullage.errors import InputError, MissingExtraError
from ullage.i18n import _
from ullage.read.jsonfile import read_json_object
from ullage.read.model_source import load_model
from ullage.spec.model import Model
from ullage.trace.job import DTYPES, TraceJob
from ullage.trace.models.hf_values import config_values


class Built:
    """A model to trace: the module, its config, the sentences on what was assumed."""

    def __init__(self, model: Any, config: Any, name: str, assumed: list[str]) -> None:
        self.model, self.config, self.name, self.assumed = model, config, name, assumed


def build_model(text: str, job: TraceJob) -> Built:
    """Build the model that ``text`` names on meta tensors: a config.json, its folder, or a name of the catalog.

    Raises:
        InputError: no such model, or transformers cannot build it without code from its repository.
        MissingExtraError: transformers is not installed.
    """
    path = Path(text).expanduser()
    if not text.endswith(".json") and not path.is_dir():
        return build_described(load_model(text), job)
    config = path / "config.json" if path.is_dir() else path
    return _build(read_json_object(config), str(config), job)


def build_described(model: Model, job: TraceJob) -> Built:
    """Build the model of a description on meta tensors.

    Raises:
        InputError: the description does not hold what transformers needs.
        MissingExtraError: transformers is not installed.
    """
    values, model_type = config_values(model), _model_type(model.architecture)
    if values is None or model_type is None:
        raise InputError(
            _("the catalog does not hold all that transformers needs to build {name}").format(name=model.name),
            remedy=_("give its config.json instead"),
        )
    built = _build({"model_type": model_type, **values}, model.name, job)
    _check_count(built.model, full_parameters(model).num_elements, model.name)
    return built


def _build(values: dict[str, Any], name: str, job: TraceJob) -> Built:
    """Build the model of a config's values."""
    transformers, dtype = _transformers(), DTYPES[job.dtype]
    assumed = []
    if values.pop("quantization_config", None) is not None and job.base is None:
        assumed.append(_("the quantisation of the checkpoint is left out: parameters are {dtype}").format(dtype=dtype))
    for key in ("auto_map", "torch_dtype", "dtype"):
        values.pop(key, None)
    config = _config(transformers, values, name)
    config.use_cache = False
    asked = {"attn_implementation": "eager"} if job.attention == "eager" else {}
    try:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), **asked)
    except Exception as error:  # transformers raises what it likes for a config that it does not take
        raise InputError(
            _("transformers {version} cannot build the model: {why}").format(
                version=transformers.__version__, why=" ".join(str(error).split())[:200]
            ),
            where=name,
        ) from error
    if getattr(model.config, "_attn_implementation", None) == "eager" and job.attention != "eager":
        assumed.append(_("attention: eager, the only one that transformers has for this model by default"))
    return Built(model, config, name, assumed)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise MissingExtraError("transformers", "trace") from None
    transformers.logging.set_verbosity_error()
    return transformers


def _model_type(architecture: str) -> str | None:
    _transformers()
    names = import_module("transformers.models.auto.modeling_auto").MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return next((model_type for model_type, each in names.items() if each == architecture), None)


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
