"""Tables of kept tensors, the loss and recompute, against figures by hand and published ones."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ullage.account.activations.backward import backward_points
from ullage.account.activations.blocks import Style, Training
from ullage.account.activations.decoder import Slice, decoder_graph
from ullage.account.activations.graph import saved_bytes
from ullage.account.activations.layer import layer_table
from ullage.account.activations.logits import LossRecipe, liger_chunk, loss_peak
from ullage.account.activations.recompute import is_recomputed, layer_memory
from ullage.account.activations.saved import Implementation, SavedTensor, Shape, table_bytes
from ullage.errors import UnknownArchitectureError
from ullage.spec import model as spec
from ullage.spec.training import Recompute

HIDDEN, INNER, HEADS, KV_HEADS, DIM = 4096, 14336, 32, 8, 128
DENSE = spec.Layer(
    mixers=(spec.Attention(num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM),),
    ffns=(spec.DenseFFN(intermediate_size=INNER),),
    norms=(spec.Norm(name="input_layernorm", size=HIDDEN), spec.Norm(name="post_attention_layernorm", size=HIDDEN)),
)
EXPERTS = spec.MoEFFN(num_experts=8, top_k=2, intermediate_size=INNER)
LATENT = spec.LatentAttention(
    num_heads=128, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
)
SHAPE = Shape(micro_batch_size=2, seq_len=1024)
TOKENS = 2048
FLASH = Implementation(attention="flash")


def num_bytes(table: tuple[SavedTensor, ...]) -> int:
    return sum(row.bytes for row in table)


def per_token(layer: spec.Layer, implementation: Implementation, shape: Shape = SHAPE) -> float:
    return num_bytes(layer_table(layer, HIDDEN, shape, implementation)) / TOKENS


def test_a_dense_layer_by_hand() -> None:
    norms = 2 * (4 * HIDDEN + 4 + 2 * HIDDEN)
    attention = 2 * HIDDEN + 2 * HEADS * DIM + 2 * 2 * KV_HEADS * DIM + 2 * HEADS * DIM + 4 * HEADS
    ffn = 2 * HIDDEN + 4 * 2 * INNER
    assert per_token(DENSE, FLASH) == norms + attention + ffn


def test_fused_kernels_keep_less() -> None:
    native, fused = FLASH, replace(FLASH, norm="fused", gated_ffn="fused")
    assert per_token(DENSE, native) - per_token(DENSE, fused) == 2 * (2 * HIDDEN + 2 * HIDDEN) + 2 * INNER


def test_a_frozen_base_keeps_no_inputs_of_linears() -> None:
    table = layer_table(DENSE, HIDDEN, SHAPE, replace(FLASH, trained=False))
    assert not [row for row in table if row.name.endswith(".input") or row.name == "normalised"]
    assert num_bytes(table) < num_bytes(layer_table(DENSE, HIDDEN, SHAPE, FLASH))


def test_attention_written_out_keeps_scores_that_grow_with_the_square() -> None:
    eager = Implementation(attention="eager")
    scores = [
        sum(row.bytes for row in layer_table(DENSE, HIDDEN, replace(SHAPE, seq_len=s), eager) if "probab" in row.name)
        for s in (1024, 2048)
    ]
    assert scores[0] == (4 + 2) * 2 * HEADS * 1024**2 and scores[1] == 4 * scores[0]
    dropped = layer_table(DENSE, HIDDEN, SHAPE, replace(eager, dropout=0.1))
    assert num_bytes(dropped) - num_bytes(layer_table(DENSE, HIDDEN, SHAPE, eager)) == 3 * 2 * HEADS * 1024**2


@pytest.mark.parametrize("size", [2, 4, 8])
def test_tensor_and_sequence_parallel_divide_all_but_the_small(size: int) -> None:
    whole = num_bytes(layer_table(DENSE, HIDDEN, SHAPE, FLASH))
    split = replace(SHAPE, tensor_parallel_size=size, sequence_parallel=True)
    assert num_bytes(layer_table(DENSE, HIDDEN, split, FLASH)) == whole // size
    without = replace(SHAPE, tensor_parallel_size=size)
    assert whole // size < num_bytes(layer_table(DENSE, HIDDEN, without, FLASH)) < whole
    context = replace(SHAPE, context_parallel_size=size)
    assert num_bytes(layer_table(DENSE, HIDDEN, context, FLASH)) == whole // size


def test_experts_keep_rows_of_their_own() -> None:
    layer = replace(DENSE, ffns=(EXPERTS,))
    table = layer_table(layer, HIDDEN, SHAPE, FLASH)
    rows = 2 * TOKENS
    experts = sum(row.bytes for row in table if row.name.startswith("experts.") and row.dtype == "bfloat16")
    assert experts == 2 * rows * (HIDDEN + 4 * INNER + 2 * HIDDEN)  # outputs, and once more with their weights
    spread = replace(SHAPE, expert_parallel_size=8)
    assert num_bytes(layer_table(layer, HIDDEN, spread, FLASH)) == num_bytes(table)  # every rank receives as many
    skewed = layer_table(layer, HIDDEN, replace(spread, expert_load=1.5), FLASH)
    assert num_bytes(skewed) > 1.3 * num_bytes(table)


def test_latent_attention_expands_to_all_heads() -> None:
    layer = replace(DENSE, mixers=(LATENT,))
    table = {row.name: row for row in layer_table(layer, 7168, SHAPE, FLASH)}
    assert table["query"].num_elements == table["key"].num_elements == TOKENS * 128 * 192
    assert table["kv_b_proj.output (values)"].num_elements == TOKENS * 128 * 256
    padded = {row.name: row for row in layer_table(layer, 7168, SHAPE, replace(FLASH, pads_values=True))}
    assert padded["value"].num_elements == padded["core.output"].num_elements == TOKENS * 128 * 192
    assert padded["o_proj.input"].num_elements == TOKENS * 128 * 128


def test_a_part_without_a_table_is_an_error() -> None:
    layer = replace(DENSE, mixers=(spec.LightningAttention(num_heads=8, head_dim=128),))
    with pytest.raises(UnknownArchitectureError, match="LightningAttention"):
        layer_table(layer, HIDDEN, SHAPE, FLASH)


def test_a_fall_back_that_is_not_known_is_an_error() -> None:
    kimi = spec.KimiDeltaAttention(num_heads=8, head_dim=64, conv_kernel=4, gate_rank=64)
    layer = replace(DENSE, mixers=(kimi,))
    assert layer_table(layer, HIDDEN, SHAPE, FLASH)
    with pytest.raises(UnknownArchitectureError, match="without its kernels"):
        layer_table(layer, HIDDEN, SHAPE, replace(FLASH, recurrent="torch"))


RECURRENT = [
    spec.GatedDeltaNet(num_k_heads=16, num_v_heads=32, k_head_dim=128, v_head_dim=128, conv_kernel=4),
    spec.KimiDeltaAttention(num_heads=32, head_dim=128, conv_kernel=4, gate_rank=128, output_gate_rank=128),
    spec.Mamba2(num_heads=48, head_dim=64, state_size=128, num_groups=1, conv_kernel=4),
    spec.Mamba(inner_size=8192, state_size=16, conv_kernel=4, dt_rank=256, inner_norms=True),
    spec.ShortConvolution(size=HIDDEN, conv_kernel=3),
]


@pytest.mark.parametrize("mixer", RECURRENT, ids=lambda mixer: type(mixer).__name__)
def test_a_graph_keeps_of_a_recurrent_mixer_what_its_table_says(mixer: spec.Mixer) -> None:
    layer = replace(DENSE, mixers=(mixer,))
    style, slice_ = Style(norm="fused", rope="fused", fused_qkv=False), Slice(batch=1, seq_len=TOKENS)
    in_graph = saved_bytes(decoder_graph(layer, HIDDEN, slice_, style, Training()))
    table = layer_table(layer, HIDDEN, SHAPE, replace(FLASH, norm="fused"))
    assert in_graph == pytest.approx(table_bytes(table), rel=1e-6)
    assert any(point.name == "recurrence" for point in backward_points(layer, HIDDEN, SHAPE, FLASH, table))


def test_recompute_leaves_the_input_or_what_no_module_gives_back() -> None:
    table = layer_table(DENSE, HIDDEN, SHAPE, FLASH)
    stream, points = TOKENS * HIDDEN * 2, backward_points(DENSE, HIDDEN, SHAPE, FLASH, table)
    backward = tuple((point.extra_bytes, point.num_weights) for point in points)
    work = max(extra for extra, _weights in backward)
    full = layer_memory(table, recomputed=True, recompute=Recompute(kind="full"), input_bytes=stream, backward=backward)
    assert (full.kept_bytes, full.working_bytes) == (stream, table_bytes(table) + work)
    some = Recompute(kind="modules", modules=("mlp",))
    modules = layer_memory(table, recomputed=False, recompute=some, input_bytes=stream, backward=backward)
    assert modules.kept_bytes == table_bytes(table) - TOKENS * 2 * (HIDDEN + 4 * INNER)
    assert modules.kept_bytes + modules.working_bytes == table_bytes(table) + work
    assert work == TOKENS * 2 * (HIDDEN + 3 * INNER - INNER)
    assert [is_recomputed(Recompute(kind="full", every=2), index, 4) for index in range(4)] == [True, False] * 2
    first = Recompute(kind="full", num_layers=1, method="block")
    assert [is_recomputed(first, index, 3) for index in range(3)] == [True, False, False]


@pytest.mark.parametrize(
    ("recipe", "bytes_per_logit"),
    [
        (LossRecipe(upcast="loss", shift_copies=True), 14),
        (LossRecipe(upcast="head", shift_copies=True), 12),
        (LossRecipe(upcast="loss", shift_copies=False), 10),
        (LossRecipe(kind="fused", upcast="loss", shift_copies=True), 10),
        (LossRecipe(kind="fused", upcast="head", shift_copies=True), 8),
        (LossRecipe(upcast="none", shift_copies=False), 4),
    ],
)
def test_the_loss_by_the_copies_it_makes(recipe: LossRecipe, bytes_per_logit: int) -> None:
    peak = loss_peak(recipe, num_tokens=4096, vocab_size=32000, hidden_size=HIDDEN, compute_dtype="bfloat16")
    assert peak.forward_bytes == 4096 * 32000 * bytes_per_logit
    half = loss_peak(
        recipe, num_tokens=4096, vocab_size=32000, hidden_size=HIDDEN, compute_dtype="bfloat16", vocab_parallel_size=2
    )
    assert half.forward_bytes * 2 == peak.forward_bytes


def test_a_fused_linear_loss_never_holds_all_logits() -> None:
    assert liger_chunk(16384, 128256, 4096) == 512 and liger_chunk(1, 128256, 4096) == 1
    sizes = {"num_tokens": 16384, "vocab_size": 128256, "hidden_size": 4096, "compute_dtype": "bfloat16"}
    plain = loss_peak(LossRecipe(), **sizes)  # type: ignore[arg-type]
    fused = loss_peak(LossRecipe(kind="liger"), head_trained=False, **sizes)  # type: ignore[arg-type]
    assert fused.forward_bytes < plain.forward_bytes / 50 and not fused.head_grad_bytes
