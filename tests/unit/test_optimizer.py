"""Optimizer states, step temporaries, gradients and adapters, against figures by hand."""

from __future__ import annotations

import pytest

from ullage.account.gradients import accumulation_bytes, clipping_bytes, gradients_term
from ullage.account.lora import AdapterPrecision, adapter_parameters, adapter_table, copied_parameters
from ullage.account.optimizer import RULES, Trained, optimizer_terms, rule_of, temporaries
from ullage.catalog import models as catalog
from ullage.errors import InputError
from ullage.spec.model import Model
from ullage.spec.training import Lora

MATRIX, VECTOR = (4096, 4096), (4096,)
TRAINED = Trained(tensors=((MATRIX, 3), (VECTOR, 2)))
ELEMENTS = 3 * 4096**2 + 2 * 4096


def states(name: str, **settings: str | None) -> int:
    values = {"moments": "float32", "params": "float32", "master": None} | settings
    return optimizer_terms(name, TRAINED, **values).bytes  # type: ignore[arg-type]


def model(name: str) -> Model:
    found = catalog.find(name)
    assert found is not None
    return catalog.load_entry(found)


@pytest.mark.parametrize(
    ("name", "per_element"), [("adamw", 8), ("adam", 8), ("sgd", 0), ("sgd_momentum", 4), ("lion", 4)]
)
def test_states_per_element(name: str, per_element: int) -> None:
    assert states(name) == per_element * ELEMENTS


def test_moments_follow_their_dtype_and_a_master_copy_comes_on_top() -> None:
    assert states("adamw", moments="bfloat16") == 4 * ELEMENTS
    assert states("adamw", params="bfloat16", master="float32") == 12 * ELEMENTS
    assert states("adamw", params="float32", master="float32") == 8 * ELEMENTS  # the parameters are the master copy


def test_quantised_states_have_one_scale_per_block() -> None:
    assert states("adamw_8bit") == 2 * (ELEMENTS + 4 * (ELEMENTS // 256))
    assert states("adamw_4bit") == 2 * (ELEMENTS // 2 + 4 * (ELEMENTS // 128))
    small = Trained(tensors=(((1024,), 1),))
    assert optimizer_terms("adamw_8bit", small, moments="float32", params="float32", master=None).bytes == 2 * 4 * 1024


def test_adafactor_keeps_rows_and_columns() -> None:
    assert states("adafactor") == 4 * (3 * 2 * 4096 + 2 * 4096)


def test_muon_keeps_one_momentum_of_matrices() -> None:
    assert states("muon") == 4 * 3 * 4096**2 + 8 * 2 * 4096


def test_paged_states_may_lie_on_the_host() -> None:
    term = optimizer_terms("paged_adamw_8bit", TRAINED, moments="float32", params="bfloat16", master=None)
    assert term.low_bytes == 0 < term.bytes == term.high_bytes


def test_temporaries_of_a_step() -> None:
    assert temporaries("adamw", TRAINED, impl="foreach", params="bfloat16") == 2 * ELEMENTS
    assert temporaries("adamw", TRAINED, impl="for_loop", params="bfloat16") == 2 * 2 * 4096**2
    assert temporaries("adamw", TRAINED, impl="fused", params="bfloat16") == 0
    assert temporaries("adamw", TRAINED, impl="foreach", params="bfloat16", num_shards=8) == 2 * ELEMENTS // 8


def test_names_and_shards() -> None:
    assert rule_of("adamw_torch") is RULES["adamw"]
    with pytest.raises(InputError, match="unknown optimizer 'adamm'"):
        rule_of("adamm")
    sharded = optimizer_terms("adamw", TRAINED, moments="float32", params="bfloat16", master="float32", num_shards=8)
    assert sharded.bytes == 12 * ELEMENTS // 8


def test_gradients_and_what_adding_to_them_takes() -> None:
    assert gradients_term(TRAINED, dtype="bfloat16").bytes == 2 * ELEMENTS
    assert accumulation_bytes(TRAINED, dtype="float32") == 4 * 4096**2
    assert clipping_bytes(TRAINED) == 5 * 512


def test_adapter_parameters_by_hand() -> None:
    mistral = model("mistralai/Mistral-7B-v0.1")
    lora = Lora(rank=16, targets=("q_proj", "k_proj", "v_proj", "o_proj"))
    per_layer = 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024))
    assert adapter_parameters(mistral, lora).num_elements == 32 * per_layer
    dora = Lora(rank=16, targets=("q_proj",), dora=True)
    assert adapter_parameters(mistral, dora).num_elements == 32 * (16 * 8192 + 4096)
    with pytest.raises(InputError, match="no linear layer of"):
        adapter_parameters(mistral, Lora(rank=8, targets=("query_key_value",)))


def test_adapters_of_all_linear_layers_reach_experts() -> None:
    mixtral = model("mistralai/Mixtral-8x7B-v0.1")
    found = adapter_parameters(mixtral, Lora(rank=1, targets=("w1",))).num_elements
    assert found == 32 * 8 * (4096 + 14336)


def test_modules_trained_in_full_are_copies_of_their_own() -> None:
    qwen = model("Qwen/Qwen-7B")
    lora = Lora(rank=8, targets=("c_attn",), trained_modules=("wte", "lm_head"))
    assert copied_parameters(qwen, lora).num_elements == 2 * 151936 * 4096
    assert copied_parameters(qwen, Lora(rank=8, targets=("c_attn",))).num_elements == 0
    with pytest.raises(InputError, match="no module of"):
        copied_parameters(qwen, Lora(rank=8, targets=("c_attn",), trained_modules=("embed",)))


def test_what_adapters_keep() -> None:
    layer, tokens = model("mistralai/Mistral-7B-v0.1").layers[0], 1000
    lora = Lora(rank=16, targets=("q_proj", "k_proj"), dropout=0.1)

    def kept(lora: Lora, **settings: object) -> int:
        table = adapter_table(
            layer,
            4096,
            lora,
            AdapterPrecision(**settings),
            num_tokens=tokens,
            num_routed_tokens=tokens,
        )
        return sum(row.bytes for row in table)

    products = 2 * 2 * 16
    assert kept(lora) == tokens * (2 * (2 + 1) * 4096 + products)  # a mask and a cast input of its own for each
    assert kept(Lora(rank=16, targets=("q_proj", "k_proj"))) == tokens * (2 * 2 * 4096 + products)
    shared = kept(Lora(rank=16, targets=("q_proj", "k_proj")), dtype="bfloat16")
    assert shared == tokens * (2 * 4096 + products)


@pytest.mark.parametrize(
    ("name", "shape", "params", "measured"),
    [
        # states and projector after one step of galore-torch 1.0 and apollo-torch 1.0.3, rank 16, storages added up
        ("galore_adamw", (256, 96), "float32", 69632),
        ("galore_adamw", (96, 256), "float32", 69632),
        ("galore_adamw", (128, 128), "float32", 81920),
        ("galore_adamw", (256, 96), "bfloat16", 19456),
        ("galore_adamw", (128, 128), "bfloat16", 12288),
        ("apollo_adamw", (256, 96), "float32", 38912),
        ("apollo_adamw", (96, 256), "bfloat16", 19456),
        ("apollo_adamw", (128, 128), "float32", 24576),
    ],
)
def test_projected_moments_are_those_that_the_packages_keep(
    name: str, shape: tuple[int, int], params: str, measured: int
) -> None:
    trained = Trained(tensors=((shape, 1),), rank=16)
    assert optimizer_terms(name, trained, moments="float32", params=params, master=None).bytes == measured


def test_embeddings_are_not_projected_and_a_rank_cannot_pass_the_shorter_side() -> None:
    framed = Trained(tensors=((MATRIX, 1),), frame=frozenset({MATRIX}))
    assert (
        optimizer_terms("galore_adamw", framed, moments="float32", params="float32", master=None).bytes == 8 * 4096**2
    )
    wide = [
        optimizer_terms(
            "apollo_adamw",
            Trained(tensors=(((64, 32), 1),), rank=rank),
            moments="float32",
            params="float32",
            master=None,
        ).bytes
        for rank in (32, 1000)
    ]
    assert wide[0] == wide[1]


def test_solving_for_a_projector_takes_more_than_drawing_it() -> None:
    solved, drawn = (
        temporaries(name, TRAINED, impl=None, params="bfloat16") for name in ("galore_adamw", "apollo_adamw")
    )
    assert solved == 4 * 4 * 4096**2 and drawn == 2 * 2 * 4096**2
