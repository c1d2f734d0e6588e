"""Every model type of the installed transformers: counted to the last parameter, or refused by name.

For each type with a causal language model, or one that reads images or sounds, the config class's defaults and variants
of them (every flag turned, other kinds of layers, fewer layers, what save_pretrained leaves out) are built on meta
tensors and read. ``ULLAGE_FUZZ_EXAMPLES`` above 100 perturbs every number of every config, one by one (minutes).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ullage.account.parameters import count
from ullage.errors import InputError, UllageError, UnknownArchitectureError
from ullage.read.hf_config import FAMILIES, read_config_object

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.reference

from transformers.models.auto import modeling_auto as auto  # noqa: E402
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES  # noqa: E402

THOROUGH = int(os.environ.get("ULLAGE_FUZZ_EXAMPLES", "0")) > 100
RECORD = json.loads(Path(__file__).with_name("model_types.json").read_text())
CLASSES = (
    transformers.AutoModelForImageTextToText,
    transformers.AutoModelForMultimodalLM,
    transformers.AutoModelForCausalLM,
)
GENERATING = sorted(
    set(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    | set(auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    | set(auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES)
)
READ = [name for name in GENERATING if name in FAMILIES]
LAYER_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
#: what a class must be given beside its defaults, so that it can be built
NEEDED: dict[str, dict[str, Any]] = RECORD["needed"]
#: why the count of the class is not that of the checkpoints
EXPLAINED: dict[str, str] = RECORD["explained"]


def text_of(config: Any) -> str:
    """Return the attribute under which the decoder's config stands, "" for the config itself."""
    for name in ("text_config", "llm_config", "language_config", "thinker_config"):
        if getattr(config, name, None) is not None:
            return name
    return ""


def build(config: Any) -> Any:
    with torch.device("meta"):
        for automatic in CLASSES:
            if type(config) in automatic._model_mapping:
                return automatic.from_config(config)
    raise LookupError(type(config))


def routed(model: Any) -> int:
    pattern = re.compile(r"(^|\.)experts\.")
    named = model.named_parameters()
    return sum(tensor.numel() for name, tensor in named if pattern.search(name) and "shared" not in name)


class Maker:
    """Makes configs of one type, with few layers where the class allows it."""

    def __init__(self, model_type: str) -> None:
        self.cls = transformers.models.auto.configuration_auto.CONFIG_MAPPING[model_type]
        whole = self.cls()
        self.part = text_of(whole)
        self.text = getattr(whole, self.part) if self.part else whole
        self.settings = dict(NEEDED.get(model_type, {}))
        layers = next((key for key in LAYER_KEYS if key in self.text.to_dict()), None)
        if layers:
            try:
                self.settings = {layers: 5, **self.settings}
                build(self.make())
            except Exception:
                self.settings.pop(layers)

    def make(self, **changes: Any) -> Any:
        settings = {**self.settings, **changes}
        if self.part:
            return self.cls(**{self.part: {"model_type": self.text.model_type, **settings}})
        return self.cls(**settings)

    def variants(self) -> Iterator[tuple[str, dict[str, Any]]]:
        yield "defaults", {}
        for key, value in (getattr(self.make(), self.part) if self.part else self.make()).to_dict().items():
            if key.startswith("_") or key in ("return_dict", "use_cache") or key.startswith("output_"):
                continue
            if isinstance(value, bool):
                yield f"{key}={not value}", {key: not value}
            elif isinstance(value, list) and value and all(isinstance(kind, str) for kind in value):
                yield f"{key} reversed", {key: value[::-1]}
            elif THOROUGH and isinstance(value, int):
                for other in (2 * value, value // 2, value + 1, 0):
                    yield f"{key}={other}", {key: other}


def difference(built: Any, values: dict[str, Any], *, refusable: bool) -> str:
    """Return how ullage's counts of a config differ from those of the model built from it; "" for not at all."""
    values = json.loads(json.dumps(values, default=str))
    values["architectures"] = [type(built).__name__]
    try:
        counts = count(read_config_object(values, where="config.json", name="x"))
    except UllageError as error:
        assert isinstance(error, InputError | UnknownArchitectureError)
        return "" if refusable else str(error)
    total, experts = sum(tensor.numel() for tensor in built.parameters()), routed(built)
    if (counts.total, counts.routed_experts) == (total, experts):
        return ""
    return f"{counts.total} of {total}, routed {counts.routed_experts} of {experts}"


@pytest.mark.parametrize("model_type", READ)
def test_types_that_are_read_are_counted_to_the_last_parameter_or_refused(model_type: str) -> None:
    try:
        maker = Maker(model_type)
        build(maker.make())
    except Exception as error:
        pytest.skip(f"transformers {transformers.__version__} cannot build its defaults: {error!r:.80}")
    wrong = {}
    for name, changes in maker.variants():
        try:
            config = maker.make(**changes)
            built = build(config)
        except Exception:
            continue  # the class refuses it
        refusable = name != "defaults" or model_type in RECORD["refused_defaults"]
        found = difference(built, config.to_dict(), refusable=refusable)
        if not found and (name == "defaults" or name.startswith("tie")):
            found = difference(built, config.to_diff_dict(), refusable=refusable)
        if found and model_type not in EXPLAINED and f"{model_type} {name.split('=')[0]}" not in EXPLAINED:
            wrong[name] = found
    assert not wrong


def test_types_that_are_not_read_are_those_on_record() -> None:
    """A type that is new in transformers stands out here: read it, or put it on record."""
    missing = [name for name in GENERATING if name not in FAMILIES]
    assert sorted(set(missing) - set(RECORD["not_read"])) == []
    assert sorted(name for name in RECORD["not_read"] if name in FAMILIES) == []


@pytest.mark.parametrize("model_type", [name for name in GENERATING if name not in FAMILIES])
def test_types_that_are_not_read_are_refused_by_name(model_type: str) -> None:
    cls = transformers.models.auto.configuration_auto.CONFIG_MAPPING[model_type]
    try:
        values = json.loads(json.dumps(cls().to_dict(), default=str))
    except Exception:
        values = {"model_type": model_type, "hidden_size": 64, "vocab_size": 64}
    values["model_type"] = model_type
    with pytest.raises(UnknownArchitectureError, match=re.escape(repr(model_type))):
        read_config_object(values, where="config.json", name="x")


def test_every_type_has_a_config_class() -> None:
    assert set(GENERATING) <= set(CONFIG_MAPPING_NAMES)
