"""What a GGUF holds: names, types by rule, and mixes inferred from a size."""

from __future__ import annotations

from dataclasses import replace

import pytest
from conftest import need_shared

from ullage.account.gguf_types import ggml_format, ggml_type
from ullage.engines.llamacpp import mixes, recipe
from ullage.engines.llamacpp.gguf_names import gguf_tensors
from ullage.read.hf_config import read_config
from ullage.spec.model import (
    Attention,
    DenseFFN,
    LatentAttention,
    Layer,
    Model,
    MoEFFN,
    Norm,
    Quantization,
    QuantRule,
)
from ullage.units import GiB

HIDDEN = 1024
NORMS = (Norm(name="input_layernorm", size=HIDDEN), Norm(name="post_attention_layernorm", size=HIDDEN))


def model(*, layers: int = 16, moe: bool = False, latent: bool = False, tied: bool = False) -> Model:
    attention: Attention | LatentAttention = Attention(num_heads=16, num_kv_heads=2, head_dim=64)
    if latent:
        attention = LatentAttention(
            num_heads=8, q_lora_rank=512, kv_lora_rank=256, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
        )
    ffn: DenseFFN | MoEFFN = DenseFFN(intermediate_size=4096)
    if moe:
        ffn = MoEFFN(num_experts=64, top_k=4, intermediate_size=512, shared_intermediate_size=512, correction_bias=True)
    layer = Layer(mixers=(attention,), ffns=(ffn,), norms=NORMS)
    return Model(
        name="m",
        architecture="m",
        hidden_size=HIDDEN,
        vocab_size=32_000,
        dtype="bfloat16",
        layers=(layer,) * layers,
        final_norms=(Norm(name="model.norm", size=HIDDEN),),
        tied_embeddings=tied,
    )


def names(of: Model, latent: str = "split") -> set[str]:
    return {tensor.name for tensor in gguf_tensors(of, latent) if tensor.layer in (-1, 3)}  # type: ignore[arg-type]


def test_a_dense_block_has_the_names_of_llama() -> None:
    parts = ("attn_q", "attn_k", "attn_v", "attn_output", "attn_norm", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")
    whole = {"token_embd.weight", "output_norm.weight", "output.weight"}
    assert names(model()) == {f"blk.3.{part}.weight" for part in parts} | whole


def test_experts_are_one_tensor_per_projection() -> None:
    by_name = {tensor.name: tensor for tensor in gguf_tensors(model(moe=True))}
    assert by_name["blk.0.ffn_down_exps.weight"].shape == (64, HIDDEN, 512)
    assert by_name["blk.0.ffn_gate_inp.weight"].vector
    assert "blk.0.exp_probs_b.bias" in by_name
    assert "blk.0.ffn_up_shexp.weight" in by_name


@pytest.mark.parametrize(
    ("storage", "parts"),
    [("whole", {"kv_b"}), ("split", {"k_b", "v_b"}), ("both", {"kv_b", "k_b", "v_b"})],
)
def test_the_latent_projection_is_whole_split_or_both(storage: str, parts: set[str]) -> None:
    found = {name for name in names(model(latent=True), storage) if name.endswith("_b.weight") and "q_b" not in name}
    assert found == {f"blk.3.attn_{part}.weight" for part in parts}


def test_q4_k_m_gives_more_bits_to_the_ends_and_every_third_layer() -> None:
    assert [mixes.more_bits(layer, 16) for layer in range(16)] == [
        *(True, True),
        *(False, False, True, False, False, True, False, False, True, False, False, True),
        *(True, True),
    ]
    of = model()
    facts = mixes.mix_facts(of)
    kinds = {tensor.name: mixes.tensor_type(tensor, "Q4_K_M", facts) for tensor in gguf_tensors(of)}
    assert kinds["blk.0.ffn_down.weight"] == kinds["blk.4.attn_v.weight"] == kinds["output.weight"] == "Q6_K"
    assert kinds["blk.3.ffn_down.weight"] == kinds["blk.3.attn_q.weight"] == kinds["token_embd.weight"] == "Q4_K"
    assert kinds["blk.3.attn_norm.weight"] == "F32"


def test_a_tied_embedding_has_the_type_of_the_output() -> None:
    of = model(tied=True)
    facts = mixes.mix_facts(of)
    assert mixes.tensor_type(gguf_tensors(of)[0], "Q4_K_M", facts) == "Q6_K"
    assert "output.weight" not in names(of)


def test_rows_that_blocks_of_256_do_not_fill_fall_back() -> None:
    by_name = {tensor.name: tensor for tensor in gguf_tensors(model(latent=True))}
    key = by_name["blk.0.attn_k_b.weight"]
    assert key.shape[-1] == 128
    assert mixes.tensor_type(key, "Q4_K_M", mixes.mix_facts(model(latent=True))) == "Q5_0"


@pytest.mark.parametrize(
    ("text", "name", "size"),
    [
        ("gguf:Q4_K_M (16.493 GiB)", "Q4_K_M", 16.493),
        ("gguf:UD-Q4_K_XL (357.623 GiB)", "Q4_K_M", 357.623),
        ("gguf:mix-IQ3_K (106.830 GiB)", "IQ3_K", 106.830),
        ("gguf:Q2_K_M (227.689 GiB)", "Q2_K", 227.689),
        ("gguf:IQ4_KS_R4", "IQ4_KS_R4", None),
        ("gguf (type not stated)", None, None),
    ],
)
def test_descriptions_give_type_and_size(text: str, name: str | None, size: float | None) -> None:
    assert recipe.file_type(text) == name
    assert recipe.stated_size(text) == (None if size is None else int(size * GiB))


def test_a_custom_mix_is_inferred_from_its_size() -> None:
    of = model(moe=True)
    tensors = gguf_tensors(of)
    kinds = [
        "F32"
        if t.vector or "norm" in t.name or "bias" in t.name
        else ("IQ5_K" if "down" in t.name else "IQ3_K")
        if t.experts
        else "Q8_0"
        for t in tensors
    ]
    sizes = [ggml_type(kind).tensor_bytes(t.shape) for t, kind in zip(tensors, kinds, strict=True)]
    found = recipe.contents(of, f"gguf:mix-IQ3_K ({sum(sizes) / GiB:.6f} GiB)", "split")
    assert list(found.types) == kinds
    assert sum(found.sizes) == pytest.approx(sum(sizes), rel=1e-5)
    assert any("IQ5_K" in sentence for sentence in found.assumed)


def test_a_model_read_from_a_gguf_keeps_its_types() -> None:
    rules = (
        QuantRule(pattern="down_proj", format=ggml_format("Q6_K")),
        QuantRule(pattern=".", format=ggml_format("Q4_0")),
    )
    of = replace(model(), quantization=Quantization(method="gguf", rules=rules))
    found = recipe.contents(of, None, "split")
    kinds = dict(zip((tensor.name for tensor in found.tensors), found.types, strict=True))
    assert found.exact
    assert (kinds["blk.1.ffn_down.weight"], kinds["blk.1.ffn_up.weight"]) == ("Q6_K", "Q4_0")
    assert kinds["blk.1.attn_norm.weight"] == "F32"


@pytest.mark.parametrize(
    ("config", "file_type", "gib"),
    [  # as llama.cpp prints "model size" for the published files
        ("openai__gpt-oss-20b", "MXFP4", 11.27),
        ("openai__gpt-oss-120b", "MXFP4", 59.02),
        ("meta-llama__Llama-3.1-8B-Instruct", "Q4_K_M", 4.58),
        ("Qwen__Qwen2.5-7B-Instruct", "Q4_K_M", 4.36),
        ("google__gemma-3-27b-it", "Q4_K_M", 15.40),
        ("Qwen__Qwen3-30B-A3B", "Q4_K_M", 17.28),
    ],
)
def test_published_files_have_the_derived_size(config: str, file_type: str, gib: float) -> None:
    of = read_config(need_shared("configs", f"{config}.json"))
    found = recipe.contents(of, f"gguf:{file_type}", "split")
    assert found.exact
    assert sum(found.sizes) / GiB == pytest.approx(gib, abs=0.006)
