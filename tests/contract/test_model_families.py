"""Parameter counts: to the last parameter, against transformers on meta tensors and against published checkpoints."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from conftest import need_shared, shared_path

from ullage.account.parameters import Parameter, Role, count, model_parameters
from ullage.errors import InputError
from ullage.read.hf_config import read_config, read_config_object
from ullage.spec.model import Model

CONFIGS = sorted(path.stem for path in shared_path("configs").glob("*__*.json"))
SIDECARS = [name for name in CONFIGS if name.endswith("__hf_quant_config")]
MODELS = [name for name in CONFIGS if name not in SIDECARS]
SMALL = json.loads(Path(__file__).with_name("small_configs.json").read_text())

#: Where the reference count is not the file's. Step-3.7: the file has its text keys beside the rest, transformers
#: looks for them in ``text_config`` alone and falls back to 128815 rows; the file says 128896 (of 4096, twice).
KNOWN_DIFFERENCES = {
    "stepfun-ai__Step-3.7-Flash": 2 * (128_896 - 128_815) * 4096,
    "stepfun-ai__Step-3.7-Flash-FP8": 2 * (128_896 - 128_815) * 4096,
}

#: Configs that transformers cannot build. Totals: the published safetensors index or model card.
PUBLISHED = {
    "LGAI-EXAONE__EXAONE-3.0-7.8B-Instruct": (7.82e9, 0.005),
    "THUDM__glm-4-9b-chat": (9.40e9, 0.005),
    "XiaomiMiMo__MiMo-7B-Base": (7.8e9, 0.005),  # with its MTP module
    "microsoft__Phi-3-small-8k-instruct": (7.39e9, 0.005),
    "microsoft__phi-2": (2.78e9, 0.005),
    "nvidia__Llama-3_3-Nemotron-Super-49B-v1": (49.9e9, 0.005),
    "sgl-project__DeepSeek-V4-Flash-FP8": (284.3e9, 0.005),
    "sgl-project__DeepSeek-V4-Pro-FP8": (1.573e12, 0.005),
}


def read_shared(name: str) -> Model:
    return read_config(need_shared("configs", f"{name}.json"))


def expected() -> dict[str, Any]:
    counts: dict[str, Any] = json.loads(need_shared("configs", "param_counts.json").read_text())
    return counts


@pytest.mark.skipif(not MODELS, reason="the shared figures are not beside this checkout")
@pytest.mark.parametrize("name", MODELS)
def test_every_config_is_read_and_counted_to_the_last_parameter(name: str) -> None:
    found, want = count(read_shared(name)), expected().get(name, {})
    if "params" not in want:
        assert found.total > 0
        return
    difference = KNOWN_DIFFERENCES.get(name, 0)
    assert found.total - difference == want["params"]
    if want["active_params"] is not None:
        assert found.active - difference == want["active_params"]
    else:
        assert found.active == found.total


@pytest.mark.skipif(not SIDECARS, reason="the shared figures are not beside this checkout")
@pytest.mark.parametrize("name", SIDECARS)
def test_quantisation_sidecars_are_refused_with_the_file_to_give_instead(name: str) -> None:
    with pytest.raises(InputError, match=r"hf_quant_config\.json.*config\.json"):
        read_shared(name)


@pytest.mark.parametrize("name", PUBLISHED)
def test_configs_beyond_transformers_agree_with_what_was_published(name: str) -> None:
    figure, tolerance = PUBLISHED[name]
    found = count(read_shared(name))
    with_mtp = found.mtp if name == "XiaomiMiMo__MiMo-7B-Base" else 0
    assert found.total + with_mtp == pytest.approx(figure, rel=tolerance)


@pytest.mark.parametrize(
    "case", SMALL, ids=[f"{index}-{case['config']['model_type']}" for index, case in enumerate(SMALL)]
)
def test_small_configs_of_every_family_agree_with_transformers(case: dict[str, Any]) -> None:
    """The figures are those of transformers 5.23.0, model built on meta tensors, tied weights once."""
    model = read_config_object(case["config"], where="small", name="small")
    assert count(model).total == case["num_parameters"]


@pytest.mark.reference
@pytest.mark.parametrize(
    "case", SMALL, ids=[f"{index}-{case['config']['model_type']}" for index, case in enumerate(SMALL)]
)
def test_small_figures_are_what_transformers_counts_today(case: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    values = dict(case["config"])
    if values["model_type"] not in transformers.models.auto.configuration_auto.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {values['model_type']}")
    config = transformers.AutoConfig.for_model(**values)
    with torch.device("meta"):
        if type(config) in transformers.AutoModelForCausalLM._model_mapping:
            built = transformers.AutoModelForCausalLM.from_config(config)
        else:  # a class that is there, and not in the automatic mapping
            module = transformers.models.__dict__[values["model_type"]]
            built = getattr(module, type(config).__name__.removesuffix("Config") + "ForCausalLM")(config)
    assert sum(parameter.numel() for parameter in built.parameters()) == case["num_parameters"]


# ----------------------------------------------------------------------------- stored elements of published checkpoints


def blocks(shape: tuple[int, ...]) -> int:
    """Scales of a matrix quantised in blocks of 128 x 128."""
    return math.ceil(shape[-2] / 128) * math.ceil(shape[-1] / 128)


def elements(parameter: Parameter) -> int:
    return math.prod(parameter.shape) * parameter.copies


def checkpoint_elements(name: str) -> int:
    entries = json.loads(need_shared("configs", "checkpoint_truth.json").read_text())
    return int(next(entry["stored_elements"] for entry in entries if entry["model"] == name))


@pytest.mark.parametrize("name", ["DeepSeek-R1", "DeepSeek-V3.2"])
def test_v3_checkpoints_hold_the_inventory_two_copies_and_the_scales(name: str) -> None:
    """Stored: every tensor with the MTP module's, its own copies of embedding and head, one scale per fp8 block.

    fp8 are all linear layers but the head, the routers, the MTP projection and the indexer's weights_proj.
    """
    model = read_shared(f"deepseek-ai__{name}")
    stored = scales = 0
    for placed in model_parameters(model):
        parameter = placed.parameter
        stored += elements(parameter)
        kept = parameter.name.endswith(("eh_proj.weight", "indexer.weights_proj.weight"))
        if parameter.role in (Role.LINEAR, Role.EXPERT) and not kept:
            scales += blocks(parameter.shape) * parameter.copies
    copies = 2 * model.vocab_size * model.hidden_size
    assert stored + copies + scales == checkpoint_elements(name)


def test_v4_checkpoint_holds_the_inventory_packed() -> None:
    """Stored: experts with two fp4 values per element and a scale per 32; fp8 linear layers with a scale per block.

    Compressors and the indexer's weights_proj are not quantised; the MTP module shares embedding and head.
    """
    stored = 0
    for placed in model_parameters(read_shared("deepseek-ai__DeepSeek-V4-Pro")):
        parameter = placed.parameter
        if parameter.role is Role.EXPERT:
            stored += elements(parameter) // 2 + elements(parameter) // 32
            continue
        stored += elements(parameter)
        kept = ".compressor." in parameter.name or parameter.name.endswith("weights_proj.weight")
        if parameter.role is Role.LINEAR and not kept:
            stored += blocks(parameter.shape)
    assert stored == checkpoint_elements("DeepSeek-V4-Pro")
