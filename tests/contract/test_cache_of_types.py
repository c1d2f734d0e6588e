"""What transformers keeps per request, against the rules of the cache: small models run on a CPU.

Three things differ, and are stated: transformers keeps w - 1 tokens of a window, where engines hold w; K columns before
a convolution, where K - 1 are needed; and a counter of eight bytes per windowed layer.
"""

from __future__ import annotations

import json
from fractions import Fraction
from typing import Any

import pytest

from ullage.account.kv_cache import bytes_per_token, mixer_rows
from ullage.account.request_cache import recurrent_state_bytes
from ullage.account.state import state_tensors
from ullage.read.hf_config import read_config_object
from ullage.spec import model as spec

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.reference

WINDOW = 16
SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "vocab_size": 160,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "sliding_window": WINDOW,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 16,
    "mamba_d_state": 8,
    "mamba_dt_rank": 8,
    "v_head_dim": 8,
    "vocab_size_per_layer_input": 160,
    "hidden_size_per_layer_input": 8,
    "state_size": 8,
    "time_step_rank": 8,
    "expand": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
TYPES: dict[str, dict[str, Any]] = {
    "afmoe": {},
    "beam": {},
    "bitnet": {},
    "cohere2_moe": {},
    "cwm": {},
    "exaone_moe": {},
    "falcon_mamba": {"intermediate_size": 128},
    "flint": {},
    "gemma4_text": {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 3},
    "gemma4_unified_text": {},
    "gpt_oss": {},
    "granite_swa": {},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "hy_v3": {},
    "hyperclovax": {},
    "jais2": {},
    "jamba": {},
    "kolibri1": {},
    "laguna": {"layer_types": ["sliding_attention", "full_attention"] * 3},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 3},
    "lfm3": {},
    "mellum": {"layer_types": ["sliding_attention", "full_attention"] * 3},
    "mimo_v2_flash": {},
    "minimax_m2": {},
    "olmo_hybrid": {},
    "solar_open": {},
    "vaultgemma": {},
}


def kept_bytes(found: Any, seen: set[int]) -> int:
    """Return the bytes of all tensors in a cache, each once."""
    if isinstance(found, torch.Tensor):
        first = id(found) not in seen
        seen.add(id(found))
        return found.numel() * found.element_size() if first else 0
    if isinstance(found, dict):
        found = list(found.values())
    if isinstance(found, list | tuple):
        return sum(kept_bytes(item, seen) for item in found)
    inside = getattr(found, "__dict__", {})
    return sum(kept_bytes(item, seen) for name, item in inside.items() if name != "config")


def kept_after(model: Any, num_tokens: int) -> int:
    tokens = torch.arange(num_tokens).remainder(150).add(3)[None]
    with torch.no_grad():
        output = model(input_ids=tokens, use_cache=True)
    cache = output.get("past_key_values", None)
    return kept_bytes(output.get("cache_params", None) if cache is None else cache, set())


def built(model_type: str) -> tuple[Any, spec.Model]:
    mapping = transformers.models.auto.configuration_auto.CONFIG_MAPPING
    if model_type not in mapping:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    cls = mapping[model_type]
    known = {*cls().to_dict(), *cls.attribute_map}
    config = cls(**{key: value for key, value in {**SMALL, **TYPES[model_type]}.items() if key in known})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    values = json.loads(json.dumps(config.to_dict(), default=str))
    return model, read_config_object(values, where="config.json", name=model_type)


@pytest.mark.parametrize("model_type", TYPES)
def test_what_a_request_keeps_is_what_the_rules_say(model_type: str) -> None:
    torch.set_num_threads(1)
    model, read = built(model_type)
    mixers = [mixer for layer in read.layers for mixer in layer.mixers]
    states = sum(recurrent_state_bytes(mixer, "float32") for mixer in mixers)
    columns = 0
    for mixer in mixers:
        kernel = getattr(mixer, "conv_kernel", 0)
        convolved = sum(tensor.num_elements for tensor in state_tensors(mixer) if "conv" in tensor.name)
        columns += 4 * convolved // (kernel - 1) if kernel else 0
    windowed = [mixer for mixer in mixers if isinstance(mixer, spec.Attention) and mixer.window and not mixer.shared_kv]
    counters = 8 * len(windowed)

    short, longer = kept_after(model, 8), kept_after(model, 12)
    slope = bytes_per_token(read, "float32")
    assert Fraction(longer - short, 4) == slope
    assert short - 8 * slope == states + columns + counters

    rows = sum(sum(row.row_bytes for row in mixer_rows(mixer, "float32")) for mixer in windowed)
    grows = bytes_per_token(read, "float32", windows=False)
    assert kept_after(model, 40) == 40 * grows + (WINDOW - 1) * rows + states + columns + counters
