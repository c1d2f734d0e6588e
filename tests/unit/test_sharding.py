"""A rank's share, against splits worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from ullage.account.parameters import Parameter, count
from ullage.account.sharding import (
    COMPONENTS,
    RankShare,
    layer_share,
    rank_parameters,
    split_shape,
    units_per_rank,
    whole,
)
from ullage.errors import LayoutError
from ullage.spec import model as spec

HIDDEN = 64
ATTENTION = spec.Attention(num_heads=8, num_kv_heads=2, head_dim=16)
FUSED = replace(ATTENTION, fused_qkv="qkv_proj", q_bias=True)
GATED = replace(ATTENTION, output_gate=True)
LATENT = spec.LatentAttention(
    num_heads=8, q_lora_rank=24, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16
)
MOE = spec.MoEFFN(num_experts=16, top_k=2, intermediate_size=32, shared_intermediate_size=32)
NORMS = (spec.Norm(name="input_layernorm", size=HIDDEN),)


def model_of(*layers: spec.Layer, tied: bool = False, mtp: tuple[spec.MtpModule, ...] = ()) -> spec.Model:
    return spec.Model(
        name="small",
        architecture="test",
        hidden_size=HIDDEN,
        vocab_size=1000,
        dtype="bfloat16",
        layers=layers,
        final_norms=(spec.Norm(name="model.norm", size=HIDDEN),),
        tied_embeddings=tied,
        mtp=mtp,
    )


def share_of(model: spec.Model, tp: int = 1, **more: object) -> RankShare:
    base = replace(whole(model), vocab_padding=64, stored_copies=False)
    widths = dict.fromkeys(
        ("attention_tp", "dense_tp", "shared_expert_tp", "expert_tp", "vocab_tp", "head_tp", "tower_tp"), tp
    )
    return replace(base, **{**widths, **more})


def shapes(layer: spec.Layer, tp: int) -> dict[str, tuple[int, ...]]:
    share = share_of(model_of(layer), tp)
    return {local.parameter.name: local.shape for local in layer_share(layer, HIDDEN, share)}


def layer_with(mixer: spec.Mixer, ffn: spec.FeedForward | None = None) -> spec.Layer:
    return spec.Layer(mixers=(mixer,), ffns=(ffn or spec.DenseFFN(intermediate_size=96),), norms=NORMS)


@pytest.mark.parametrize(
    ("tp", "q", "k", "o"),
    [
        (1, (128, 64), (32, 64), (64, 128)),
        (2, (64, 64), (16, 64), (64, 64)),
        (4, (32, 64), (16, 64), (64, 32)),  # two KV heads on four ranks: each rank holds one
        (8, (16, 64), (16, 64), (64, 16)),
    ],
)
def test_key_value_heads_are_divided_then_replicated(
    tp: int, q: tuple[int, int], k: tuple[int, int], o: tuple[int, int]
) -> None:
    found = shapes(layer_with(ATTENTION), tp)
    assert found["self_attn.q_proj.weight"] == q
    assert found["self_attn.k_proj.weight"] == found["self_attn.v_proj.weight"] == k
    assert found["self_attn.o_proj.weight"] == o


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_a_fused_projection_is_split_as_its_parts(tp: int) -> None:
    apart, fused = shapes(layer_with(ATTENTION), tp), shapes(layer_with(FUSED), tp)
    rows = sum(apart[f"self_attn.{part}_proj.weight"][0] for part in "qkv")
    assert fused["self_attn.qkv_proj.weight"] == (rows, HIDDEN)
    assert fused["self_attn.qkv_proj.bias"] == (rows,)


def test_a_gated_query_has_twice_the_rows() -> None:
    assert shapes(layer_with(GATED), 4)["self_attn.q_proj.weight"] == (64, 64)


def test_latent_projections_are_on_every_rank() -> None:
    found = shapes(layer_with(LATENT), 4)
    assert found["self_attn.q_a_proj.weight"] == (24, 64)
    assert found["self_attn.kv_a_proj_with_mqa.weight"] == (40, 64)
    assert found["self_attn.q_b_proj.weight"] == (2 * 24, 24)
    assert found["self_attn.kv_b_proj.weight"] == (2 * 32, 32)
    assert found["self_attn.o_proj.weight"] == (64, 2 * 16)


def test_dense_blocks_are_split_on_the_inner_axis() -> None:
    found = shapes(layer_with(ATTENTION), 4)
    assert found["mlp.gate_proj.weight"] == found["mlp.up_proj.weight"] == (24, 64)
    assert found["mlp.down_proj.weight"] == (64, 24)
    assert found["input_layernorm.weight"] == (64,)


def test_experts_are_sliced_or_spread() -> None:
    layer = layer_with(ATTENTION, MOE)
    model = model_of(layer)
    sliced = {p.placed.name: p for p in rank_parameters(model, share_of(model, 4))}
    name = "model.layers.0.mlp.experts.{e}.up_proj.weight"
    assert (sliced[name].shape, sliced[name].copies) == ((8, 64), 16)
    spread = share_of(model, 4, expert_tp=1, num_local_experts=5)  # 16 and 4 redundant on 4 ranks
    found = {p.placed.name: p for p in rank_parameters(model, spread)}
    assert (found[name].shape, found[name].copies) == ((32, 64), 5)
    assert found["model.layers.0.mlp.shared_experts.up_proj.weight"].shape == (8, 64)
    assert found["model.layers.0.mlp.gate.weight"].shape == (16, 64)


def test_the_vocabulary_is_padded_before_it_is_split() -> None:
    model = model_of(layer_with(ATTENTION))
    found = {p.placed.name: p.shape for p in rank_parameters(model, share_of(model, 8))}
    assert found["model.embed_tokens.weight"] == found["lm_head.weight"] == (1024 // 8, HIDDEN)


@pytest.mark.parametrize(
    ("embedding", "head", "names"),
    [
        (True, True, {"model.embed_tokens.weight"}),
        (True, False, {"model.embed_tokens.weight"}),
        (False, True, {"lm_head.weight"}),  # the last stage keeps its own copy
        (False, False, set()),
    ],
)
def test_a_tied_head_is_a_copy_only_away_from_the_embedding(embedding: bool, head: bool, names: set[str]) -> None:
    model = model_of(layer_with(ATTENTION), tied=True)
    share = share_of(model, embedding=embedding, head=head)
    found = {p.placed.name for p in rank_parameters(model, share) if p.component in ("embedding", "lm_head")}
    assert found == names


def test_an_mtp_module_is_split_like_a_layer_and_counted_apart() -> None:
    layer = layer_with(LATENT, MOE)
    module = spec.MtpModule(
        layer=layer,
        norms=(spec.Norm(name="enorm", size=HIDDEN),),
        extras=(spec.ExtraTensor(name="eh_proj.weight", shape=(HIDDEN, 2 * HIDDEN)),),
        stores_embedding=True,
        stores_head=True,
    )
    model = model_of(layer, mtp=(module,))
    found = {p.placed.name: p for p in rank_parameters(model, share_of(model, 4)) if p.component == "mtp"}
    assert found["model.layers.1.self_attn.q_b_proj.weight"].shape == (48, 24)
    assert found["model.layers.1.eh_proj.weight"].shape == (64, 128)
    assert not any("embed_tokens" in name for name in found)
    stored = {p.placed.name for p in rank_parameters(model, whole(model)) if p.component == "mtp"}
    assert stored - set(found) == {"model.layers.1.embed_tokens.weight", "model.layers.1.shared_head.head.weight"}
    own = model_of(layer, mtp=(replace(module, shares_head=False),))
    heads = [p for p in rank_parameters(own, share_of(own, 4)) if p.placed.name.endswith("shared_head.head.weight")]
    assert [p.shape for p in heads] == [(1024 // 4, HIDDEN)]


def test_stages_add_up_to_the_model() -> None:
    layers = (layer_with(ATTENTION), layer_with(LATENT, MOE), layer_with(ATTENTION, MOE))
    model = model_of(*layers)
    parts = [
        share_of(model, layers=(0, 1), head=False, final=False, vocab_padding=1),
        share_of(model, layers=(1, 3), embedding=False, vocab_padding=1),
    ]
    held = sum(math.prod(p.shape) * p.copies for part in parts for p in rank_parameters(model, part))
    assert held == count(model).total


def test_components_are_named() -> None:
    model = model_of(layer_with(LATENT, MOE), layer_with(ATTENTION))
    found = {p.component for p in rank_parameters(model, whole(model))}
    assert found <= set(COMPONENTS)
    assert {"attention", "dense_ffn", "routed_experts", "shared_experts", "router", "norms"} <= found


@pytest.mark.parametrize(("units", "tp", "per_rank"), [(8, 1, 8), (8, 8, 1), (8, 16, 1), (1, 8, 1), (6, 3, 2)])
def test_units_per_rank(units: int, tp: int, per_rank: int) -> None:
    assert units_per_rank(units, tp, where="k_proj") == per_rank


@pytest.mark.parametrize(("units", "tp"), [(8, 3), (3, 8), (6, 4)])
def test_uneven_heads_are_refused(units: int, tp: int) -> None:
    with pytest.raises(LayoutError, match="k_proj"):
        units_per_rank(units, tp, where="k_proj")


def test_uneven_splits_name_the_tensor() -> None:
    layer = layer_with(ATTENTION, spec.DenseFFN(intermediate_size=98))
    with pytest.raises(LayoutError, match=r"gate_proj.*axis 0"):
        layer_share(layer, HIDDEN, share_of(model_of(layer), 4))
    with pytest.raises(LayoutError, match="heads"):
        layer_share(layer_with(ATTENTION), HIDDEN, share_of(model_of(layer), 16))
    model = model_of(layer_with(ATTENTION))
    with pytest.raises(LayoutError, match="vocabulary"):
        list(rank_parameters(model, share_of(model, 1, vocab_tp=3)))


def test_a_replicated_tensor_keeps_its_shape() -> None:
    parameter = Parameter(name="router", shape=(7, 5))
    assert split_shape(parameter, 4) == (7, 5)


def test_a_second_table_of_tokens_splits_like_the_embedding() -> None:
    table = spec.ExtraTensor(name="embed_tokens_per_layer.weight", shape=(1000, 96), split="vocab", linear=False)
    projection = spec.ExtraTensor(name="per_layer_projection.weight", shape=(96, HIDDEN))
    model = spec.Model(
        name="two tables",
        architecture="x",
        hidden_size=HIDDEN,
        vocab_size=1000,
        dtype="bfloat16",
        layers=(),
        final_norms=(),
        extras=(table, projection),
    )
    share = replace(whole(model), vocab_tp=4, head_tp=4, vocab_padding=64)
    shapes = {held.placed.parameter.name: held.shape for held in rank_parameters(model, share)}
    assert shapes["embed_tokens_per_layer.weight"] == (*shapes["model.embed_tokens.weight"][:1], 96) == (256, 96)
    assert shapes["per_layer_projection.weight"] == (96, HIDDEN)
