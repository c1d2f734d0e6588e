"""Laws that every split and every format obeys."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from ullage.account.parameters import count
from ullage.account.sharding import RankShare, rank_parameters, whole
from ullage.account.weights import checkpoint_bytes, weights_term
from ullage.spec import model as spec
from ullage.units import DTYPE_BYTES, WeightFormat, dtype_bytes

formats = st.builds(
    WeightFormat,
    name=st.just("x"),
    dtype=st.sampled_from(sorted(DTYPE_BYTES)),
    block=st.none() | st.tuples(st.integers(0, 256), st.integers(0, 256)),
    scale_dtype=st.sampled_from(["float32", "float8_e8m0", "bfloat16"]),
    zero_point_dtype=st.none() | st.just("int4"),
    tensor_scales=st.integers(0, 3),
    column_index_bytes=st.sampled_from([0, 4]),
    kept_of=st.none() | st.sampled_from([(2, 4), (4, 8)]),
)


@st.composite
def models(draw: st.DrawFn) -> spec.Model:
    heads = draw(st.sampled_from([8, 16]))
    kv_heads = draw(st.sampled_from([1, 2, 8]))
    attention = spec.Attention(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([8, 64])),
        q_bias=draw(st.booleans()),
        fused_qkv=draw(st.none() | st.just("qkv_proj")),
    )
    latent = spec.LatentAttention(
        num_heads=heads, q_lora_rank=24, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16
    )
    moe = spec.MoEFFN(
        num_experts=8, top_k=2, intermediate_size=64, shared_intermediate_size=draw(st.sampled_from([0, 64]))
    )
    dense = spec.DenseFFN(intermediate_size=128)
    pool = [
        spec.Layer(mixers=(mixer,), ffns=(ffn,), norms=(spec.Norm(name="norm", size=64),))
        for mixer in (attention, latent)
        for ffn in (dense, moe)
    ]
    return spec.Model(
        name="drawn",
        architecture="test",
        hidden_size=64,
        vocab_size=draw(st.integers(1, 5000)),
        dtype=draw(st.sampled_from(["float32", "bfloat16"])),
        layers=tuple(draw(st.lists(st.sampled_from(pool), min_size=1, max_size=6))),
        final_norms=(spec.Norm(name="model.norm", size=64),),
        tied_embeddings=draw(st.booleans()),
    )


def split(model: spec.Model, tp: int, layers: tuple[int, int]) -> RankShare:
    last = layers[1] == len(model.layers)
    return RankShare(
        layers=layers,
        embedding=layers[0] == 0,
        head=last,
        final=last,
        mtp=False,
        towers=False,
        attention_tp=tp,
        dense_tp=tp,
        shared_expert_tp=tp,
        expert_tp=tp,
        vocab_tp=tp,
        head_tp=tp,
    )


@given(model=models())
def test_a_whole_share_has_every_parameter_once(model: spec.Model) -> None:
    held = sum(math.prod(p.shape) * p.copies for p in rank_parameters(model, whole(model)))
    assert held == count(model).total
    assert checkpoint_bytes(model) == held * dtype_bytes(model.dtype)


@given(model=models(), tp=st.sampled_from([1, 2, 4, 8]))
def test_ranks_together_hold_at_least_the_model(model: spec.Model, tp: int) -> None:
    one, all_ = (weights_term(model, share).bytes for share in (split(model, tp, (0, len(model.layers))), whole(model)))
    assert one * tp >= all_
    assert one <= weights_term(model, split(model, 1, (0, len(model.layers)))).bytes


@given(model=models(), data=st.data())
def test_stages_add_up(model: spec.Model, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(model.layers)))
    parts = [weights_term(model, split(model, 1, span)).bytes for span in ((0, cut), (cut, len(model.layers)))]
    together = weights_term(model, split(model, 1, (0, len(model.layers)))).bytes
    copied = 0 < cut < len(model.layers) and model.tied_embeddings
    padded = -(-model.vocab_size // 64) * 64 * 64 * dtype_bytes(model.dtype)
    if 0 < cut < len(model.layers):
        assert sum(parts) == together + (padded if copied else 0)


@given(model=models(), tp=st.sampled_from([1, 2, 4]))
def test_the_sum_over_tensors_is_the_term(model: spec.Model, tp: int) -> None:
    share = split(model, tp, (0, len(model.layers)))
    by_tensor = sum(
        math.prod(p.shape) * p.copies * dtype_bytes(p.placed.parameter.dtype or model.dtype)
        for p in rank_parameters(model, share)
    )
    assert weights_term(model, share).bytes == by_tensor


@given(format_=formats, rows=st.integers(1, 500), columns=st.integers(1, 500))
def test_stored_bytes_grow_with_the_matrix_and_split_into_no_less(
    format_: WeightFormat, rows: int, columns: int
) -> None:
    size = format_.stored_bytes((rows, columns))
    assert size >= math.floor(rows * columns * dtype_bytes(format_.dtype) / (2 if format_.kept_of else 1))
    assert format_.stored_bytes((rows + 1, columns)) >= size
    assert format_.stored_bytes((rows, columns + 1)) >= size
    assert 2 * format_.stored_bytes((rows, columns)) >= format_.stored_bytes((2 * rows, columns))
