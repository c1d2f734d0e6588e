"""Models of transformers: the catalog's dimensions, adapters, routing, kernels."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from ullage.errors import InputError
from ullage.trace.api import trace

pytestmark = pytest.mark.reference
SMALL = {"seq_len": 64, "steps": 1}


def test_a_model_of_the_catalog_has_its_parameters():
    result = trace("qwen2.5-0.5b", seq_len=128, steps=1)
    assert result.num_parameters == 494_032_768
    assert result.categories()["parameter"] == 2 * 494_032_768


def test_recompute_keeps_the_inputs_of_layers_alone(config):
    """At the end of the forward pass each layer holds its input and nothing else."""
    kept = {}
    for recompute in ("none", "full"):
        found = trace(config("llama"), recompute=recompute, unroll=False, **SMALL).trace
        last = next(index for index, where in enumerate(found.where) if found.places[where].phase == "backward")
        kept[recompute] = sum(
            found.allocations[number].size_bytes
            for number in found.alive_at(last)
            if found.places[found.allocations[number].place].module.startswith("model.layers.")
            and found.allocations[number].category == "activation"
        )
    assert kept["full"] == 13 * 64 * 64 * 2  # the inputs of layers 1 to 13; the norm keeps a copy of the last output
    assert kept["none"] > 10 * kept["full"]


def test_experts_get_equal_shares_unless_told(config):
    even = trace(config("deepseek_v3"), **SMALL)
    assert any("same number of tokens" in each for each in even.warnings)
    skewed = trace(config("deepseek_v3"), routing_skew=1.0, **SMALL)
    assert any("proportion" in each for each in skewed.warnings)


def test_adapters(config):
    pytest.importorskip("peft")
    result = trace(config("llama"), lora="r=4,targets=q_proj+v_proj", **SMALL)
    assert result.num_trained == 14 * (4 * (64 + 64) + 4 * (64 + 32))
    gradients = {one.owner for one in result.trace.allocations if one.category == "gradient"}
    assert gradients and all("lora_" in owner for owner in gradients)


def test_8bit_states(config):
    result = trace(config("llama"), optimizer="adamw8bit", **SMALL)
    found = result.trace.allocations
    states = sum(one.size_bytes for one in found if one.category == "optimizer_state")
    counts = [one.size_bytes // 2 for one in found if one.category == "parameter"]
    assert sum(counts) == result.num_trained
    blocks = sum(2 * count + 2 * 4 * -(-count // 256) for count in counts if count >= 4096)
    whole = sum(2 * 4 * count for count in counts if count < 4096)
    assert states == blocks + whole + 2 * 256 * 4


def test_the_kernel_asked_for_must_be_able_to(config):
    with pytest.raises(InputError, match="flash attention kernel cannot take"):
        trace(config("llama"), dtype="fp32", attention="flash", **SMALL)
    efficient = trace(config("llama", num_key_value_heads=4), attention="efficient", **SMALL)
    assert any("efficient" in one.op for one in efficient.trace.allocations)


def test_model_types_without_code_are_refused(config):
    with pytest.raises(InputError, match="never runs"):
        trace(config("llama", model_type="made_up_by_a_repository"), **SMALL)
