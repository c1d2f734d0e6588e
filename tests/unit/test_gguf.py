"""GGUF headers against the gguf package as oracle, and damaged files; the models read from them."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest

from ullage.account.gguf_types import BY_NAME, BY_NUMBER, ggml_format, ggml_type
from ullage.account.kv_cache import bytes_per_token
from ullage.account.parameters import count
from ullage.account.weights import checkpoint_bytes
from ullage.errors import InputError, UnknownArchitectureError
from ullage.read.gguf import SkippedArray, read_gguf, read_gguf_model
from ullage.spec.model import Attention, DenseFFN, LatentAttention, MoEFFN

gguf = pytest.importorskip("gguf")
numpy = pytest.importorskip("numpy")

#: The package gives Q8_1 two fp32 where ggml.h has two fp16; it is never stored in a file.
NEVER_STORED = {"Q8_1"}
LLAMA = {"head_count": 4, "head_count_kv": 2}


class Writer:
    """Writes a small GGUF; tensors are all zero."""

    def __init__(self, path: Path, architecture: str, *, hidden: int = 64, vocab: int = 96, blocks: int = 2) -> None:
        self.path, self.hidden, self.blocks = path, hidden, blocks
        self.file = gguf.GGUFWriter(path, architecture)
        self.file.add_name("tiny")
        self.file.add_block_count(blocks)
        self.file.add_context_length(2048)
        self.file.add_embedding_length(hidden)
        self.file.add_array("tokenizer.ggml.tokens", [f"t{index}" for index in range(vocab)])
        self.add("token_embd.weight", vocab, hidden, kind="Q8_0")
        self.add("output_norm.weight", hidden)

    def number(self, key: str, value: Any) -> None:
        """Add a number, or a list of them, under the architecture's name."""
        key = f"{self.file.arch}.{key}"
        if isinstance(value, list):
            self.file.add_array(key, value)
        else:
            self.file.add_uint32(key, value)

    def add(self, name: str, *shape: int, kind: str = "F32") -> None:
        """Add a tensor of ``shape``, row length last, stored as ``kind``."""
        number = gguf.GGMLQuantizationType[kind]
        block_size, block_bytes = gguf.GGML_QUANT_SIZES[number]
        row = shape[-1] // block_size * block_bytes
        data = numpy.zeros((*shape[:-1], row), numpy.uint8)
        self.file.add_tensor(name, data, raw_dtype=number)

    def attention(self, block: int, heads: int = 4, kv_heads: int = 2, dim: int = 16, kind: str = "Q8_0") -> None:
        at = f"blk.{block}."
        self.add(at + "attn_norm.weight", self.hidden)
        self.add(at + "attn_q.weight", heads * dim, self.hidden, kind=kind)
        self.add(at + "attn_k.weight", kv_heads * dim, self.hidden, kind=kind)
        self.add(at + "attn_v.weight", kv_heads * dim, self.hidden, kind="F16")
        self.add(at + "attn_output.weight", self.hidden, heads * dim, kind=kind)

    def dense(self, block: int, inner: int = 128, kind: str = "Q4_0") -> None:
        at = f"blk.{block}."
        self.add(at + "ffn_norm.weight", self.hidden)
        self.add(at + "ffn_gate.weight", inner, self.hidden, kind=kind)
        self.add(at + "ffn_up.weight", inner, self.hidden, kind=kind)
        self.add(at + "ffn_down.weight", self.hidden, inner, kind=kind)

    def experts(self, block: int, number: int = 8, inner: int = 32) -> None:
        at = f"blk.{block}."
        self.add(at + "ffn_norm.weight", self.hidden)
        self.add(at + "ffn_gate_inp.weight", number, self.hidden)
        self.add(at + "ffn_gate_exps.weight", number, inner, self.hidden, kind="MXFP4")
        self.add(at + "ffn_up_exps.weight", number, inner, self.hidden, kind="MXFP4")
        self.add(at + "ffn_down_exps.weight", number, self.hidden, inner, kind="MXFP4")

    def close(self) -> Path:
        self.file.write_header_to_file()
        self.file.write_kv_data_to_file()
        self.file.write_tensors_to_file()
        self.file.close()
        return self.path


def llama(path: Path, **numbers: Any) -> Path:
    writer = Writer(path, "llama")
    for key, value in {**LLAMA, **numbers}.items():
        writer.number(f"attention.{key}", value)
    for block in range(2):
        writer.attention(block)
        writer.dense(block)
    writer.add("output.weight", 96, 64, kind="Q8_0")
    return writer.close()


# ------------------------------------------------------------------------------------------------------------- types


@pytest.mark.parametrize("kind", list(gguf.GGMLQuantizationType), ids=lambda kind: str(kind.name))
def test_sizes_are_those_of_the_gguf_package(kind: Any) -> None:
    ours = BY_NUMBER[int(kind)]
    assert ours.name == kind.name
    if kind.name not in NEVER_STORED:
        assert (ours.block_size, ours.block_bytes) == gguf.GGML_QUANT_SIZES[kind]


@pytest.mark.parametrize(
    ("name", "bits"),  # bits per weight of a row of 4096, as ik_llama.cpp's quantize help prints them
    [("IQ4_K", 4.5), ("IQ4_KS", 4.25), ("IQ5_K", 5.5), ("IQ6_K", 6.625), ("IQ3_K", 3.4375), ("IQ2_KS", 2.1875)],
)
def test_bits_per_weight_of_ik_types(name: str, bits: float) -> None:
    row = ggml_type(name).tensor_bytes((1, 4096))
    assert row * 8 / 4096 == pytest.approx(bits, abs=0.01)


def test_repacked_types_take_what_their_base_takes() -> None:
    anew = ("IQ1_S_R4", "IQ1_M_R4", "Q8_KV_R8", "Q8_K_R8", "Q8_K_R16")  # other blocks than their base
    for name, kind in BY_NAME.items():
        base = BY_NAME.get(name.rsplit("_R", 1)[0])
        if "_R" in name and base is not None and name not in anew:
            assert kind.tensor_bytes((16, 512)) == base.tensor_bytes((16, 512)), name


def test_numbers_are_unique() -> None:
    assert len(BY_NUMBER) == len(BY_NAME)


def test_a_type_is_a_weight_format() -> None:
    for name in ("Q4_K", "IQ4_KS", "F16"):
        assert ggml_format(name).stored_bytes((3, 512)) == ggml_type(name).tensor_bytes((3, 512))
    with pytest.raises(InputError, match="known are"):
        ggml_type("Q9_K")


# ----------------------------------------------------------------------------------------------------------- headers


def test_what_the_writer_writes_is_read(tmp_path: Path) -> None:
    path = llama(tmp_path / "m.gguf")
    ours, theirs = read_gguf(path), gguf.GGUFReader(path)
    assert ours.missing_bytes == 0
    assert {name: tensor.num_bytes for name, tensor in ours.tensors.items()} == {
        tensor.name: int(tensor.n_bytes) for tensor in theirs.tensors
    }
    assert {name: tensor.shape for name, tensor in ours.tensors.items()} == {
        tensor.name: tuple(int(size) for size in reversed(tensor.shape)) for tensor in theirs.tensors
    }
    assert ours.metadata["general.architecture"] == "llama"
    assert ours.metadata["tokenizer.ggml.tokens"][:2] == ["t0", "t1"]


def test_long_arrays_are_passed_over(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "llama")
    writer.add_array("tokenizer.ggml.tokens", ["x"] * 20_000)
    writer.add_array("tokenizer.ggml.scores", [0.0] * 20_000)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    found = read_gguf(tmp_path / "v.gguf").metadata
    assert found["tokenizer.ggml.tokens"] == found["tokenizer.ggml.scores"] == SkippedArray(length=20_000)


def test_shards_are_read_together(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=2)
    for index in range(5):
        writer.add_tensor(f"t{index}", numpy.zeros((4, 8), numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    shards = sorted(tmp_path.glob("m-*.gguf"))
    assert len(shards) == 3
    assert set(read_gguf(shards[1]).tensors) == {f"t{index}" for index in range(5)}
    shards[2].unlink()
    with pytest.raises(InputError, match="no such file"):
        read_gguf(shards[0])


def test_a_header_alone_is_enough_and_says_so(tmp_path: Path) -> None:
    path = llama(tmp_path / "m.gguf")
    whole = read_gguf_model(path)
    path.write_bytes(path.read_bytes()[:-20_000])
    cut = read_gguf_model(path)
    assert "20,000 bytes before" in cut.assumed[0] and not whole.assumed
    assert cut.layers == whole.layers


def header(num_tensors: int = 0, num_keys: int = 0, rest: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_keys) + rest


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def info(name: str, axes: tuple[int, ...], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(axes)}QIQ", len(axes), *axes, kind, offset)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GGML" + bytes(40),
        header(version=1),
        header(version=0x03000000),  # big endian
        header(num_tensors=2**62),
        header(num_keys=2**62),
        header(num_keys=1, rest=struct.pack("<Q", 2**60) + b"x"),
        header(num_keys=1, rest=text("k") + struct.pack("<I", 77)),
        header(num_keys=1, rest=text("k") + struct.pack("<IIQ", 9, 4, 2**40)),
        header(num_keys=1, rest=text("k") + struct.pack("<IIQ", 9, 9, 1)),  # an array of arrays
        header(num_keys=2, rest=(text("k") + struct.pack("<II", 4, 1)) * 2),
        header(num_keys=1, rest=text("general.alignment") + struct.pack("<II", 4, 33)),
        header(num_tensors=1, rest=info("x", (32,) * 9, 0, 0)),
        header(num_tensors=1, rest=info("x", (31,), 8, 0)),  # half a block
        header(num_tensors=1, rest=info("x", (32,), 4444, 0)),
        header(num_tensors=1, rest=info("x", (2**63,), 0, 0)),
        header(num_tensors=1, rest=info("x", (32,), 0, 7)),  # not aligned
        header(num_tensors=2, rest=info("x", (32,), 0, 0) * 2),  # twice
        header(num_tensors=2, rest=info("x", (32,), 0, 0) + info("y", (32,), 0, 64)),  # overlap
    ],
)
def test_damaged_headers_are_refused_in_one_sentence(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    with pytest.raises(InputError) as caught:
        read_gguf(path)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------------------ models


def test_a_llama(tmp_path: Path) -> None:
    model = read_gguf_model(llama(tmp_path / "m.gguf"))
    assert (model.name, model.hidden_size, model.vocab_size, len(model.layers)) == ("tiny", 64, 96, 2)
    assert not model.tied_embeddings and model.max_position_embeddings == 2048
    (attention,) = model.layers[0].mixers
    assert attention == Attention(num_heads=4, num_kv_heads=2, head_dim=16)
    assert model.layers[0].ffns == (DenseFFN(intermediate_size=128),)
    assert model.layers[0] is model.layers[1]
    assert checkpoint_bytes(model) == read_gguf(tmp_path / "m.gguf").num_bytes
    assert bytes_per_token(model, "f16") == 2 * 2 * 2 * 16 * 2


def test_biases_norms_windows_and_ties_are_read_off_the_tensors(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "m.gguf", "gemma3", blocks=6)
    for key, value in {**LLAMA, "sliding_window": 512, "key_length": 16, "value_length": 16}.items():
        writer.number(f"attention.{key}", value)
    for block in range(6):
        writer.attention(block)
        writer.dense(block)
        for name in ("attn_q_norm", "attn_k_norm"):
            writer.add(f"blk.{block}.{name}.weight", 16)
        for name in ("post_attention_norm", "post_ffw_norm"):
            writer.add(f"blk.{block}.{name}.weight", 64)
        writer.add(f"blk.{block}.attn_q.bias", 64)
    model = read_gguf_model(writer.close())
    mixers = [layer.mixers[0] for layer in model.layers]
    assert [mixer.window for mixer in mixers if isinstance(mixer, Attention)] == [512] * 5 + [None]
    assert all(isinstance(mixer, Attention) and mixer.qk_norm == "head" and mixer.q_bias for mixer in mixers)
    assert model.tied_embeddings and len(model.layers[0].norms) == 4
    assert checkpoint_bytes(model) == read_gguf(writer.path).num_bytes


@pytest.mark.parametrize("split", [True, False])
def test_latent_attention_and_experts(tmp_path: Path, split: bool) -> None:
    writer = Writer(tmp_path / "m.gguf", "deepseek2")
    numbers: dict[str, int] = {
        "head_count": 4,
        "head_count_kv": 1 if split else 4,
        "kv_lora_rank": 32,
        "q_lora_rank": 32,
        "key_length": 40 if split else 24,
        "value_length": 32 if split else 16,
    }
    if split:
        numbers |= {"key_length_mla": 24, "value_length_mla": 16}
    for key, number in numbers.items():
        writer.number(f"attention.{key}", number)
    writer.number("rope.dimension_count", 8)
    writer.number("expert_used_count", 2)
    for block in range(2):
        at = f"blk.{block}."
        writer.add(at + "attn_norm.weight", 64)
        writer.add(at + "attn_q_a.weight", 32, 64, kind="Q8_0")
        writer.add(at + "attn_q_a_norm.weight", 32)
        writer.add(at + "attn_q_b.weight", 4 * 24, 32, kind="Q8_0")
        writer.add(at + "attn_kv_a_mqa.weight", 40, 64, kind="Q8_0")
        writer.add(at + "attn_kv_a_norm.weight", 32)
        if split:
            writer.add(at + "attn_k_b.weight", 4, 32, 16, kind="F16")
            writer.add(at + "attn_v_b.weight", 4, 16, 32, kind="F16")
        else:
            writer.add(at + "attn_kv_b.weight", 4 * 32, 32, kind="F16")
        writer.add(at + "attn_output.weight", 64, 64, kind="Q8_0")
    writer.dense(0)
    writer.experts(1)
    writer.add("blk.1.exp_probs_b.bias", 8)
    for part in ("gate", "up"):
        writer.add(f"blk.1.ffn_{part}_shexp.weight", 32, 64, kind="Q8_0")
    writer.add("blk.1.ffn_down_shexp.weight", 64, 32, kind="Q8_0")
    model = read_gguf_model(writer.close())
    (latent,) = model.layers[0].mixers
    assert latent == LatentAttention(
        num_heads=4, q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16
    )
    (moe,) = model.layers[1].ffns
    assert moe == MoEFFN(
        num_experts=8, top_k=2, intermediate_size=32, shared_intermediate_size=32, correction_bias=True
    )
    assert checkpoint_bytes(model) == read_gguf(writer.path).num_bytes
    assert count(model).active < count(model).total


def test_types_may_differ_from_layer_to_layer(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "m.gguf", "qwen3", blocks=12)
    for key, value in LLAMA.items():
        writer.number(f"attention.{key}", value)
    for block in range(12):
        writer.attention(block)
        writer.dense(block, inner=256, kind="Q5_0" if block in (1, 10, 11) else "Q4_0")
    model = read_gguf_model(writer.close())
    assert checkpoint_bytes(model) == read_gguf(writer.path).num_bytes


def test_what_is_not_understood_is_named(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "m.gguf", "mamba")
    writer.number("attention.head_count", 4)
    for block in range(2):
        writer.attention(block)
        writer.dense(block)
        writer.add(f"blk.{block}.ssm_a.weight", 64)
    with pytest.raises(UnknownArchitectureError, match="ssm_a"):
        read_gguf_model(writer.close())


def test_a_window_of_unknown_pattern_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownArchitectureError, match="sliding_window"):
        read_gguf_model(llama(tmp_path / "m.gguf", sliding_window=512))


@pytest.mark.parametrize(("key", "value"), [("head_count", 0), ("head_count", 3), ("head_count_kv", 4)])
def test_heads_that_do_not_fit_the_tensors_are_refused(tmp_path: Path, key: str, value: int) -> None:
    with pytest.raises((InputError, UnknownArchitectureError)):
        read_gguf_model(llama(tmp_path / "m.gguf", **{key: value}))
