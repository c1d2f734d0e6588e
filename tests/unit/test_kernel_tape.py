"""The tape of sizes: lifetimes, sums of gradients, blocks and buffers; and kernels against published figures."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ullage.account.activations.logits import LossRecipe, loss_peak
from ullage.account.kernels import chunked, ffn, losses, ops
from ullage.account.kernels.device import Device
from ullage.account.kernels.megatron_moe import Sizes
from ullage.account.kernels.needs import needs_of
from ullage.account.kernels.tape import Tape, Tensor, block_bytes
from ullage.errors import UllageError
from ullage.records.compare import NotComparableError
from ullage.records.kernels import SCRIPTS, predict
from ullage.records.schema import read_record
from ullage.units import MiB

LARGE = 4 * MiB  # of a tensor: no rounding below ten of these


def _peak(tape: Tape) -> float:
    return tape.memory.peak / LARGE


def test_a_tensor_goes_with_its_last_reader() -> None:
    tape = Tape()
    x = tape.empty(MiB, 4)
    view = x.detach()
    del x
    assert tape.memory.live == LARGE
    del view
    assert tape.memory.live == 0 and tape.memory.peak == LARGE


def test_the_graph_keeps_what_the_gradient_needs() -> None:
    tape = Tape()
    x = tape.leaf(MiB, 4)
    out = ops.pointwise(tape, ops.scale(tape, x))  # keeps its input, whose maker keeps nothing
    assert tape.memory.live == 3 * LARGE
    tape.run_backward(out, tape.empty(MiB, 4))
    del out
    assert tape.memory.live == 2 * LARGE and x.grad is not None  # x and its gradient


@pytest.mark.parametrize(("retain_graph", "kept"), [(False, 3), (True, 4)])
def test_a_retained_graph_keeps_on(retain_graph: bool, kept: int) -> None:
    tape = Tape()
    x = tape.leaf(MiB, 4)
    out = ops.pointwise(tape, ops.scale(tape, x))
    tape.run_backward(out, tape.empty(MiB, 4), retain_graph=retain_graph)
    assert tape.memory.live == kept * LARGE


def test_without_recording_nothing_is_kept() -> None:
    tape = Tape()
    x = tape.leaf(MiB, 4)
    tape.recording = False
    out = ops.pointwise(tape, ops.scale(tape, x))
    assert tape.memory.live == 2 * LARGE and not out.requires_grad


def test_two_gradients_are_added_in_place_where_nobody_else_holds_the_first() -> None:
    def peak(folded: bool) -> float:
        tape = Tape()
        x, one, other = tape.leaf(MiB, 4), tape.leaf(1024 * 1024, 4), tape.leaf(1024 * 1024, 4)
        for _step in range(2):
            tape.memory.reset()
            made = ops.add(tape, *(ops.linear(tape, x, each, 1024, folded=folded) for each in (one, other)))
            tape.run_backward(made, tape.empty(MiB, 4))
            del made
        return _peak(tape)

    assert peak(True) == peak(False) + 1


def test_a_broadcast_gradient_is_summed_beside_a_buffer() -> None:
    """Figures by hand from setReduceConfig: 1024 x 4096 on 148 processors, 16 blocks a column."""
    device = Device(num_multiprocessors=148)
    assert device.sum_buffer_bytes(4096, 1024) == 4 * 4096 * 16 * 128
    assert device.sum_buffer_bytes(4096, 512) == 0  # a thread sums 128 values: not split
    assert device.sum_buffer_bytes(16384, 2048) == 4 * 16384 * 19 * 128  # as many as fill the device
    assert Device(num_multiprocessors=0).sum_buffer_bytes(4096, 1024) == 0


def test_a_gradient_asked_for_is_not_accumulated() -> None:
    tape = Tape()
    leaf = tape.leaf(MiB, 4)
    x = tape.view(leaf)
    made = ops.scale(tape, x)
    found = tape.run_backward_all([made], [tape.empty(MiB, 4)], into=[x])
    assert len(found) == 1 and leaf.grad is None


@pytest.mark.parametrize(
    ("asked", "block"),
    [(1, 512), (513, 1024), (501 * MiB, 502 * MiB), (500 * MiB + 1, 500 * MiB + 512), (12 * MiB, 12 * MiB)],
)
def test_blocks_as_the_allocator_counts_them(asked: int, block: int) -> None:
    assert block_bytes(asked) == block


def test_slices_need_less_than_the_whole() -> None:
    def peak(num_slices: int) -> int:
        tape = Tape()
        x = tape.leaf(4096 * 1024, 2)
        gate, up, down = (tape.leaf(1024 * 4096, 2) for _each in range(3))
        weights = ffn.Weights(gate=gate, up=up, down=down)
        for _step in range(2):
            tape.memory.reset()
            made = ffn.in_slices(tape, x, weights, 4096, num_slices, fused=True)
            tape.run_backward(made, tape.empty(made.num_elements, made.width))
            del made
        return tape.memory.peak

    assert peak(16) < peak(4) < peak(1)


def test_a_chunked_head_never_holds_all_logits() -> None:
    def peak(version: tuple[int, ...]) -> int:
        tape = Tape()
        x, head = tape.leaf(16384 * 4096, 2), tape.leaf(128256 * 4096, 2)
        made = chunked.liger_cross_entropy_head(tape, x, head, 16384, 128256, version=version, wide_sum=False)
        assert isinstance(made, Tensor)
        return tape.memory.peak

    assert peak((0, 6, 1)) < 16384 * 128256 * 2
    assert peak((0, 6, 3)) - peak((0, 6, 1)) > 5 * 128256 * 4096  # the product and its fp32 copy


def _row(kernel: str, provider: str, version: str, gpu: str, mode: str, value: float, **params: Any) -> Any:
    return read_record(
        {
            "id": kernel,
            "group": "liger-kernel-bench",
            "kernel": kernel,
            "provider": provider,
            "mode": mode,
            "params": params,
            "gpu": gpu,
            "version": f"liger {version}",
            "measured": [{"quantity": "max_allocated", "value": value, "unit": "MiB"}],
        },
        "here",
    )


A100, H100, B200 = "A100-80GB-SXM", "H100-80GB-SXM", "B200-180GB"
GSPO = "fused_linear_grpo_loss_sequence"
LLAMA = {"hidden": 4096, "vocab": 128256, "dtype": "bf16"}
BLOCK = {"hidden": 4096, "intermediate": 11008, "dtype": "bf16", "tokens": 8192}
EXPERTS = {"num_experts": 8, "hidden": 2048, "intermediate": 768, "topk": 8, "dtype": "bf16", "tokens": 8192}
#: Rows of linkedin/Liger-Kernel:benchmark/data/all_benchmark_data.csv and all_benchmark_data_cutile.csv @ead96b61
#: (whole process, MiB).
PUBLISHED = [
    _row("cross_entropy", "huggingface", "0.2.1", A100, "full", 10240.126, batch=8, seq=2048, vocab=32768),
    _row("cross_entropy", "liger", "0.2.1", A100, "full", 2048.329, batch=8, seq=2048, vocab=32768),
    _row("cross_entropy", "liger_cutile", "0.8.0", B200, "full", 3006.017, vocab=128256, tokens=2048),
    _row("kl_div", "torch", "0.2.1", "H100-80GB-PCIe", "full", 1792.0, batch=8, seq=2048, vocab=4096),
    _row("kl_div", "liger_triton", "0.8.0", B200, "full", 7014.001, vocab=128256, tokens=2048),
    _row("jsd", "torch", "0.8.0", B200, "full", 13026.001, vocab=128256, tokens=2048),
    _row("tvd", "torch", "0.7.0", H100, "full", 2048.001, batch=8, seq=2048, vocab=4096),
    _row("rms_norm", "huggingface", "0.2.1", A100, "full", 80.020, rows=2048, hidden=1024, dtype="bf16"),
    _row("rms_norm", "liger", "0.2.1", A100, "full", 268.133, rows=2048, hidden=8192, dtype="bf16"),
    _row("layer_norm", "liger", "0.2.1", A100, "full", 80.906, rows=4096, hidden=1024, dtype="fp32"),
    _row("fused_add_rms_norm", "liger_rms_norm", "0.7.0", H100, "full", 104.036, rows=2048, dtype="fp32", hidden=1024),
    _row("dyt", "torch", "0.8.0", B200, "full", 960.032, hidden=4096, dtype="bf16", beta=False, tokens=8192),
    _row(
        "rope", "huggingface", "0.2.1", A100, "full", 234.141,
        dtype="bf16", seq=2048, num_q_heads=32, num_kv_heads=8, hidden=8192,
    ),
    _row(
        "llama4_rope", "liger", "0.6.1", H100, "full", 115.516,
        dtype="bf16", seq=2048, num_q_heads=32, num_kv_heads=8, hidden=8192,
    ),
    _row("geglu", "huggingface", "0.2.1", A100, "full", 1992.25, **BLOCK),
    _row("geglu", "huggingface", "0.2.1", A100, "forward", 1090.25, **BLOCK),
    _row("geglu", "liger", "0.2.1", A100, "backward", 1582.25, **BLOCK),
    _row("fused_moe", "huggingface", "0.7.0", H100, "full", 1761.766, **EXPERTS),
    _row("fused_moe", "liger", "0.7.0", H100, "forward", 817.134, **EXPERTS),
    _row("megatron_swiglu", "torch", "0.8.1", H100, "full", 112.001, seq=2048, batch=4, ffn_local=1024),
    _row("megatron_cross_entropy", "megatron-fused", "0.8.0", H100, "full", 384.166, seq=2048, batch=4, vocab=4096),
    _row("fused_linear_cross_entropy", "liger", "0.4.2", A100, "full", 4910.438, tokens=16384, **LLAMA),
    _row("fused_linear_jsd", "liger_triton", "0.8.0", B200, "full", 9777.375, tokens=8192, **LLAMA),
    _row("fused_linear_grpo_loss_token", "torch", "0.6.1", A100, "full", 37474.5, seq=1024, batch=16, **LLAMA),
    _row(GSPO, "liger_cutile", "0.8.0", B200, "full", 7350.113, seq=1024, batch=8, **LLAMA),
    _row("fused_linear_simpo_loss", "liger", "0.4.1", A100, "full", 7675.329, seq=1024, batch=2, **LLAMA),
    _row("fused_linear_cpo_loss", "huggingface", "0.4.1", A100, "full", 33418.426, seq=1024, batch=16, **LLAMA),
]  # fmt: skip


@pytest.mark.parametrize("record", PUBLISHED, ids=lambda record: f"{record.job['kernel']}-{record.job['provider']}")
def test_peaks_as_published(record: Any) -> None:
    amount = predict(record).figures["max_allocated"]
    assert amount.value == pytest.approx(record.measured[0].value, rel=2e-3)
    assert amount.low <= record.measured[0].value <= amount.high


def test_what_cannot_be_the_kernels_own_is_not_compared() -> None:
    small = _row("softmax", "liger", "0.5.8", "RTX3090", "full", 0.0195, rows=2048, hidden=1024, dtype="fp32")
    unknown = _row("multi_token_attention", "liger", "0.8.0", B200, "full", 20.0, batch=2, seq=128)
    missing = _row("kl_div", "torch", "0.8.0", B200, "full", 20.0, tokens=128)
    for record in (small, unknown, missing):
        with pytest.raises(NotComparableError):
            predict(record)


def test_every_script_names_its_source() -> None:
    assert all(script.__doc__ for script in SCRIPTS.values())


def test_needs_of_a_loss_agree_with_the_closed_form() -> None:
    tokens, vocab, hidden = 16384, 128256, 4096

    def program(tape: Tape) -> Any:
        x, head = tape.leaf(tokens * hidden, 2), tape.leaf(vocab * hidden, 2)
        return lambda: chunked.liger_cross_entropy_head(tape, x, head, tokens, vocab, version=(0, 6, 3), wide_sum=False)

    found = needs_of(program)
    sizes = {"num_tokens": tokens, "vocab_size": vocab, "hidden_size": hidden, "compute_dtype": "bfloat16"}
    closed = loss_peak(LossRecipe(kind="liger"), head_trained=True, **sizes)  # type: ignore[arg-type]
    assert found.forward_bytes == pytest.approx(closed.forward_bytes, rel=1e-3)
    assert found.gradient_bytes == pytest.approx(closed.kept_bytes, rel=1e-3)


def test_needs_of_cross_entropy_by_hand() -> None:
    logits = 4 * 1024 * 4096

    def program(tape: Tape) -> Any:
        x = tape.leaf(1024 * 4096, 4)
        return lambda: losses.cross_entropy(tape, x, 1024)

    found = needs_of(program)
    assert found.forward_bytes == pytest.approx(logits, rel=1e-3)  # the log-softmax
    assert found.backward_bytes == pytest.approx(3 * logits, rel=1e-3)  # and two gradients
    assert found.gradient_bytes == pytest.approx(logits, rel=1e-3)


def test_rows_received_where_a_token_goes_to_a_rank_once() -> None:
    layer = {"num_tokens": 4096, "hidden_size": 8, "intermediate_size": 8, "num_ranks": 8}
    assert Sizes(num_local_experts=1, top_k=2, **layer).num_received == 2 * 4096
    grouped = Sizes(num_local_experts=4, top_k=8, num_groups=4, **layer)
    assert grouped.num_rows == 8 * 4096 and 3.8 * 4096 < grouped.num_received < 4 * 4096


def test_a_layer_of_experts_as_published() -> None:
    """NVIDIA/Megatron-LM@d98e8a64:tests/functional_tests/test_cases/common/moe_perf/baseline.json (bytes)."""
    record = read_record(
        {
            "id": "moe",
            "group": "megatron-moe-layer-perf",
            "kernel": "moe_layer",
            "provider": "megatron_deepep",
            "mode": "full",
            "params": {"seq": 4096, "batch": 1, "hidden": 4096, "moe_intermediate": 14336, "num_experts": 8, "topk": 2}
            | {"ep": 8, "dtype": "bf16"},
            "gpu": "H100",
            "version": "Megatron-LM d98e8a64",
            "measured": [{"quantity": "max_allocated", "value": 2890295808, "unit": "bytes"}],
        },
        "here",
    )
    assert predict(record).figures["max_allocated"].value == pytest.approx(2890295808, rel=0.02)


@pytest.mark.parametrize("value", [0, -1, 1, 10**6, 10**12, "x", None, True, 1.5, [1]])
@pytest.mark.parametrize("record", PUBLISHED[::3], ids=lambda record: str(record.job["kernel"]))
def test_nonsense_is_one_sentence_and_takes_no_time(record: Any, value: Any) -> None:
    for key in record.job["params"]:
        job = dict(record.job) | {"params": dict(record.job["params"]) | {key: value}}
        try:
            predict(replace(record, job=job))
        except UllageError as error:
            assert str(error)
