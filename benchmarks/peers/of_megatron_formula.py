"""Megatron-LM's report_theoretical_memory: run by benchmarks/layouts.py with the folder of its source."""

import contextlib
import importlib.util
import io
import itertools
import json
import sys
import time
import types
from pathlib import Path

#: DeepSeek-V3 in Megatron-LM's words. Source: deepseek-ai/DeepSeek-V3 config.json; Megatron-LM's arguments.py.
V3 = {
    "num_layers": 61,
    "hidden_size": 7168,
    "num_attention_heads": 128,
    "kv_channels": 128,
    "group_query_attention": False,
    "num_query_groups": 128,
    "num_experts": 256,
    "moe_layer_freq": [0] * 3 + [1] * 58,
    "moe_ffn_hidden_size": 2048,
    "moe_shared_expert_intermediate_size": 2048,
    "moe_router_topk": 8,
    "ffn_hidden_size": 18432,
    "swiglu": True,
    "mtp_num_layers": 1,
    "multi_latent_attention": True,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_head_dim": 128,
    "qk_pos_emb_head_dim": 64,
    "v_head_dim": 128,
    "normalization": "RMSNorm",
    "padded_vocab_size": 129280,
    "untie_embeddings_and_output_weights": True,
    "moe_latent_size": None,
    "qk_layernorm": True,
    "add_bias_linear": False,
    "moe_router_enable_expert_bias": True,
    "seq_length": 4096,
    "use_distributed_optimizer": True,
    "sequence_parallel": True,
    "recompute_granularity": "selective",
    "context_parallel_size": 1,
    "expert_tensor_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
}


def load(folder):
    """Load the one file without the rest of Megatron-LM; what it imports from beside it only prints and asks."""
    for name in ("megatron", "megatron.training"):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = []
    utils = types.ModuleType("megatron.training.utils")
    utils.is_hybrid_model = lambda args: False
    utils.print_rank_0 = lambda *words: None
    sys.modules["megatron.training.utils"] = utils
    path = Path(folder) / "megatron" / "training" / "theoretical_memory_usage.py"
    spec = importlib.util.spec_from_file_location("megatron.training.theoretical_memory_usage", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def arguments(tensor, pipeline, expert, micro_batch):
    data = 2048 // (tensor * pipeline)
    return types.SimpleNamespace(
        **V3,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        transformer_pipeline_model_parallel_size=pipeline,
        expert_model_parallel_size=expert,
        data_parallel_size=data,
        micro_batch_size=micro_batch,
        world_size=2048,
        global_batch_size=15360,
    )


def main(folder, seconds):
    report = load(folder).report_theoretical_memory
    grid = itertools.cycle(itertools.product((1, 2, 4, 8), (2, 4, 8, 16, 32), (8, 16, 32, 64), (1, 2, 4)))
    with contextlib.redirect_stdout(io.StringIO()):
        figure = report(arguments(1, 16, 64, 1), num_microbatches=120)[2]
        number, begin = 0, time.process_time()
        while time.process_time() - begin < seconds:
            report(arguments(*next(grid)), num_microbatches=120)
            number += 1
        taken = time.process_time() - begin
    print(json.dumps({"number": number, "seconds": taken, "figures": {"deepseek-v3": figure / 1024}}))


main(sys.argv[1], float(sys.argv[2]))
