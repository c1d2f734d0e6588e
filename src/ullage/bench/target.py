"""What is trained: ``module:function`` or a Transformers model by its config; both make ``step(micro_batch, seq)``."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ullage.errors import InputError, MissingExtraError
from ullage.i18n import _

#: Runs one whole optimizer step on the device it was made for.
Step = Callable[[int, int], None]
DTYPES = ("bf16", "fp32", "bf16-mixed")
OPTIMIZERS = ("adamw", "sgd")


@dataclass(frozen=True, kw_only=True)
class Target:
    """What one step trains and how.

    Attributes:
        what: ``module:function``, or the path of a ``config.json`` or of the folder that holds it.
        layers: decoder layers instead of the config's own; ``overrides`` are further (key, value) of the config.
        dtype: bf16 and fp32 hold everything in that format; bf16-mixed is autocast over fp32 weights.
        optimizer: adamw or sgd, as torch.optim has them.
        recompute: checkpoint every decoder layer.
        lora: rank of adapters on all linear layers of the decoder, 0 for none.
        grad_accum: passes per step.
    """

    what: str
    layers: int | None = None
    overrides: tuple[tuple[str, Any], ...] = ()
    dtype: str = "bf16"
    optimizer: str = "adamw"
    recompute: bool = False
    lora: int = 0
    grad_accum: int = 1

    @property
    def is_function(self) -> bool:
        """A function of the user's own."""
        return ":" in self.what and not Path(self.what).exists()


def read_config(target: Target) -> dict[str, Any]:
    """Return the config with its overrides laid over, as plain JSON values.

    Raises:
        InputError: there is no config, or it cannot be read.
    """
    from ullage.read.jsonfile import parse_json_object

    path = Path(target.what)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise InputError(
            _("no such config"),
            where=target.what[:200],
            remedy=_("give module:function, a config.json, or a folder with one"),
        )
    config = parse_json_object(path.read_text(encoding="utf-8"), where=str(path))
    config.update(dict(target.overrides))
    if target.layers is not None:
        config["num_hidden_layers"] = target.layers
        for key in ("layer_types", "mlp_layer_types"):
            if isinstance(config.get(key), list):
                config[key] = config[key][: target.layers]
    return config


def check(target: Target) -> None:
    """Refuse a target that cannot be built, before any process is started."""
    if target.is_function:
        return
    if "model_type" not in read_config(target):
        raise InputError(_("the config has no model_type"), where=target.what[:200])


def build(target: Target, device: Any, *, wrap: Callable[[Any], Any] | None = None) -> Step:
    """Return the step of a target on a device.

    Args:
        target: what to train.
        device: a ``torch.device``.
        wrap: laid around the model of a config before its optimizer is made (data parallel over ranks).
    """
    if target.is_function:
        return _function(target.what, device)
    model = config_model(target, device)
    vocabulary = model.config.get_text_config().vocab_size
    return training_step(wrap(model) if wrap else model, target, device, vocabulary)


def _function(what: str, device: Any) -> Step:
    import importlib
    import sys

    module_name, _colon, name = what.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        factory = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise InputError(
            _("cannot be loaded ({error})").format(error=error),
            where=what[:200],
            remedy=_("module:function names a function that takes a device and returns step(micro_batch, seq)"),
        ) from None
    step: Step = factory(device)
    if not callable(step):
        raise InputError(_("the function returned no step(micro_batch, seq)"), where=what[:200])
    return step


def config_model(target: Target, device: Any) -> Any:
    """Build the Transformers model of a config with random weights, set up as the target says."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise MissingExtraError(error.name or "transformers", "trace") from None
    config_values = read_config(target)
    kind = config_values.pop("model_type")
    config = transformers.AutoConfig.for_model(kind, **config_values)
    config.use_cache = False
    held = torch.bfloat16 if target.dtype == "bf16" else torch.float32
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=held)
    if target.recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if target.lora:
        model = _with_adapters(model, target)
    return model.train()


def _with_adapters(model: Any, target: Target) -> Any:
    try:
        import peft
    except ImportError:
        raise MissingExtraError("peft", "trace") from None
    settings = peft.LoraConfig(r=target.lora, target_modules="all-linear", task_type="CAUSAL_LM")
    if target.recompute:
        model.enable_input_require_grads()
    return peft.get_peft_model(model, settings)


def training_step(model: Any, target: Target, device: Any, vocabulary: int) -> Step:
    """Return a step: passes of random tokens, the model's own loss, gradients set free, one optimizer step."""
    import torch

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kinds = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    optimizer = kinds[target.optimizer](trained, lr=1e-5)
    mixed = target.dtype == "bf16-mixed"

    def step(micro_batch: int, seq: int) -> None:
        for _pass in range(target.grad_accum):
            tokens = torch.randint(0, vocabulary, (micro_batch, seq), device=device)
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=mixed):
                loss = model(input_ids=tokens, labels=tokens).loss
            (loss / target.grad_accum).backward()
            del loss
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def to_json(target: Target) -> str:
    """Return a target for the process that runs it."""
    return json.dumps({**vars(target), "overrides": [list(pair) for pair in target.overrides]})


def from_json(text: str) -> Target:
    """Read what :func:`to_json` wrote."""
    values = json.loads(text)
    return Target(**{**values, "overrides": tuple((key, value) for key, value in values["overrides"])})
