"""Small configs of each family, and ways to spoil configs, command lines and headers."""

from __future__ import annotations

import copy
import json
import signal
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

SHARED_CONFIGS = Path(__file__).parents[2].parent / "shared" / "configs"

_COMMON = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 512,
    "vocab_size": 1024,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
}
_FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}
_LATENT = {
    "q_lora_rank": 96,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "moe_intermediate_size": 128,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "num_nextn_predict_layers": 1,
    "topk_method": "noaux_tc",
    "quantization_config": _FP8,
}
CONFIGS: list[dict[str, Any]] = [
    {**_COMMON, "model_type": "llama", "architectures": ["LlamaForCausalLM"], "attention_bias": False},
    {**_COMMON, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "use_sliding_window": False},
    {**_COMMON, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 64},
    {**_COMMON, **_LATENT, "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]},
    {
        **_COMMON,
        **_LATENT,
        "model_type": "deepseek_v32",
        "architectures": ["DeepseekV32ForCausalLM"],
        "index_head_dim": 32,
        "index_n_heads": 4,
        "index_topk": 64,
    },
    {
        **_COMMON,
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "head_dim": 32,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True},
    },
    {
        **_COMMON,
        "model_type": "gpt_oss",
        "architectures": ["GptOssForCausalLM"],
        "head_dim": 32,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "attention_bias": True,
        "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]},
    },
    {
        **_COMMON,
        "model_type": "deepseek_v4",
        "architectures": ["DeepseekV4ForCausalLM"],
        "head_dim": 64,
        "qk_rope_head_dim": 16,
        "q_lora_rank": 96,
        "o_lora_rank": 64,
        "o_groups": 4,
        "num_key_value_heads": 1,
        "hc_mult": 4,
        "index_head_dim": 32,
        "index_n_heads": 8,
        "index_topk": 64,
        "moe_intermediate_size": 128,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "num_hash_layers": 1,
        "num_nextn_predict_layers": 1,
        "compress_ratios": [0, 4, 128, 4, 0],
        "sliding_window": 128,
        "quantization_config": _FP8,
    },
    {
        "model_type": "gemma3",
        "architectures": ["Gemma3ForConditionalGeneration"],
        "text_config": {**_COMMON, "model_type": "gemma3_text", "head_dim": 32, "sliding_window_pattern": 6},
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 128,
            "patch_size": 14,
            "image_size": 224,
            "vision_use_head": False,
        },
        "torch_dtype": "bfloat16",
    },
    {
        **_COMMON,
        "model_type": "qwen3_next",
        "architectures": ["Qwen3NextForCausalLM"],
        "head_dim": 64,
        "full_attention_interval": 4,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 8,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
]


def all_configs() -> list[dict[str, Any]]:
    """Return the configs above, and real ones where they lie beside the project."""
    real = []
    for path in sorted(SHARED_CONFIGS.glob("*.json"))[::3] if SHARED_CONFIGS.is_dir() else []:
        values = json.loads(path.read_text())
        if isinstance(values, dict) and "model_type" in values:
            real.append(values)
    return CONFIGS + real


def nested(depth: int) -> Any:
    value: Any = 1
    for _level in range(depth):
        value = [value]
    return value


SPOILT: list[Any] = [
    None,
    True,
    False,
    "",
    "abc",
    "-1",
    "fp8",
    "\x00\ud800",
    "(a+)+$" * 20,
    0,
    1,
    -1,
    3,
    0.5,
    -0.0,
    2**31,
    2**40,
    2**63,
    10**30,
    10**400,
    1e308,
    float("nan"),
    float("inf"),
    float("-inf"),
    [],
    {},
    [None],
    [0] * 5000,
    ["x"] * 100,
    {"": {}},
    {"a": [1, {"b": None}]},
    nested(50),
]


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, dict):
        for key in value:
            yield (*path, key)
            yield from _paths(value[key], (*path, key))
    elif isinstance(value, list):
        for index in range(min(len(value), 4)):
            yield (*path, index)
            yield from _paths(value[index], (*path, index))


@st.composite
def spoilt_configs(draw: st.DrawFn, configs: list[dict[str, Any]]) -> dict[str, Any]:
    """Draw a config with one to four things done to it."""
    config = copy.deepcopy(draw(st.sampled_from(configs)))
    for _step in range(draw(st.integers(1, 4))):
        paths = list(_paths(config))
        if not paths:
            break
        *parents, key = draw(st.sampled_from(paths))
        holder: Any = config
        for parent in parents:
            holder = holder[parent]
        _spoil(draw, holder, key, configs)
    return config


def _spoil(draw: st.DrawFn, holder: Any, key: Any, configs: list[dict[str, Any]]) -> None:
    how = draw(st.sampled_from(["spoil", "spoil", "scale", "delete", "rename", "nest", "graft"]))
    value = holder[key]
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if how == "delete":
        del holder[key]
    elif how == "rename" and isinstance(holder, dict):
        holder[draw(st.sampled_from([str(key) + "_", str(key).upper(), "dim", "n_layers", "kv_heads"]))] = holder.pop(
            key
        )
    elif how == "nest":
        holder[key] = {str(key): value} if draw(st.booleans()) else [value]
    elif how == "scale" and number:
        factor = draw(st.sampled_from([-1, 2, 3, 7, 1000, 10**6, 10**12, 0.5]))
        try:
            holder[key] = value * factor
        except OverflowError:
            holder[key] = factor
    elif how == "graft" and isinstance(holder, dict):
        other = draw(st.sampled_from(configs))
        holder.update(
            {name: copy.deepcopy(other[name]) for name in draw(st.lists(st.sampled_from(sorted(other)), max_size=5))}
        )
    else:
        holder[key] = copy.deepcopy(draw(st.sampled_from(SPOILT)))


WORDS = [
    "",
    "-1",
    "0",
    "1",
    "8",
    "3",
    "1e9",
    "1e999",
    "nan",
    "inf",
    "99999999999999999999999",
    "32k",
    "32K",
    "0.9",
    "1.5",
    "-0.5",
    "auto",
    "fp8",
    "fp8_ds_mla",
    "q8_0",
    "nvfp4",
    "true",
    "{}",
    "[1,2",
    '{"method": "mtp", "num_speculative_tokens": 3}',
    '{"level": 99999999999}',
    "é\u202e",
    "a" * 5000,
    "a" * 300 + "/config.json",
    "a" * 300 + ".gguf",
    "--",
    "--json",
    "--help",
    "'",
    '"',
    "$(id)",
    "/nonexistent/config.json",
    "8xH200",
    "0xH200",
    "999999999xH100",
    "24GiB",
    "mixtral",
    "deepseek-v3",
    "vllm",
    "sglang@0.5.2",
    "llamacpp",
    "blk.*.ffn_.*=CPU",
    "(a+)+$=CPU",
    "16,32",
    "1,,2",
]


@st.composite
def spoilt_argv(draw: st.DrawFn, lines: list[list[str]], words: list[str]) -> list[str]:
    """Draw a command line with one to four tokens changed."""
    tokens = list(draw(st.sampled_from(lines)))
    for _step in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, len(tokens) - 1)))
        how = draw(st.sampled_from(["replace", "replace", "insert", "delete", "double", "join", "cut"]))
        if how == "insert" or not tokens:
            tokens.insert(place, draw(st.sampled_from(words)))
        elif how == "replace":
            tokens[place] = draw(st.sampled_from(words))
        elif how == "delete":
            del tokens[place]
        elif how == "double":
            tokens.insert(place, tokens[place])
        elif how == "join":
            tokens[place] = tokens[place] + "=" + draw(st.sampled_from(words))
        else:
            tokens[place] = tokens[place][: len(tokens[place]) // 2]
    return tokens


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Fail with TimeoutError when the body takes longer than ``seconds`` (a hang, not a slow machine)."""

    def stop(_signal: int, _frame: Any) -> None:
        raise TimeoutError(f"no answer within {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# ------------------------------------------------------------------------------------------------------ file headers


def safetensors_header(tensors: dict[str, tuple[str, list[int], int]]) -> bytes:
    """Return the head of a safetensors file: name -> (dtype, shape, bytes)."""
    table: dict[str, Any] = {}
    offset = 0
    for name, (dtype, shape, size) in tensors.items():
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    body = json.dumps(table).encode()
    return struct.pack("<Q", len(body)) + body


def _gguf_string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def gguf_header() -> bytes:
    """Return the head of a GGUF file of a two-layer Llama in Q8_0: metadata and tensor table.

    Source: ggml's docs/gguf.md, version 3.
    """
    metadata: list[tuple[str, int, Any]] = [
        ("general.architecture", 8, "llama"),
        ("general.name", 8, "tiny"),
        ("llama.block_count", 4, 2),
        ("llama.embedding_length", 4, 64),
        ("llama.feed_forward_length", 4, 128),
        ("llama.attention.head_count", 4, 4),
        ("llama.attention.head_count_kv", 4, 2),
        ("llama.context_length", 4, 2048),
        ("llama.attention.layer_norm_rms_epsilon", 6, 1e-6),
        ("tokenizer.ggml.tokens", 9, ["a", "b", "c", "d"]),
    ]
    shapes = {"token_embd.weight": (64, 4), "output_norm.weight": (64,), "output.weight": (64, 4)}
    for layer in range(2):
        shapes |= {
            f"blk.{layer}.attn_q.weight": (64, 64),
            f"blk.{layer}.attn_k.weight": (64, 32),
            f"blk.{layer}.attn_v.weight": (64, 32),
            f"blk.{layer}.attn_output.weight": (64, 64),
            f"blk.{layer}.attn_norm.weight": (64,),
            f"blk.{layer}.ffn_gate.weight": (64, 128),
            f"blk.{layer}.ffn_up.weight": (64, 128),
            f"blk.{layer}.ffn_down.weight": (128, 64),
            f"blk.{layer}.ffn_norm.weight": (64,),
        }
    out = b"GGUF" + struct.pack("<IQQ", 3, len(shapes), len(metadata))
    for key, kind, value in metadata:
        out += _gguf_string(key) + struct.pack("<I", kind)
        if kind == 8:
            out += _gguf_string(value)
        elif kind == 9:
            out += struct.pack("<IQ", 8, len(value)) + b"".join(map(_gguf_string, value))
        else:
            out += struct.pack("<f" if kind == 6 else "<I", value)
    offset = 0
    for name, shape in shapes.items():
        kind, size = (0, 4 * shape[0]) if len(shape) == 1 else (8, shape[0] * shape[1] // 32 * 34)
        out += _gguf_string(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape)
        out += struct.pack("<IQ", kind, offset)
        offset += -(-size // 32) * 32
    return out


@st.composite
def spoilt_bytes(draw: st.DrawFn, whole: bytes) -> bytes:
    """Draw a header cut short, with bytes overwritten, or with a length blown up."""
    data = bytearray(whole)
    for _step in range(draw(st.integers(1, 4))):
        how = draw(st.sampled_from(["flip", "cut", "length", "insert"]))
        place = draw(st.integers(0, max(0, len(data) - 1)))
        if how == "flip" and data:
            data[place] = draw(st.integers(0, 255))
        elif how == "cut":
            del data[place:]
        elif how == "length":
            data[place : place + 8] = struct.pack("<Q", draw(st.sampled_from([0, 1, 2**20, 2**32, 2**63, 2**64 - 1])))
        else:
            data[place:place] = draw(st.binary(max_size=64))
    return bytes(data)
