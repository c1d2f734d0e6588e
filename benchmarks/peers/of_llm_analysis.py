"""llm-analysis: run by benchmarks/layouts.py in an environment that has it."""

import contextlib
import io
import itertools
import json
import logging
import sys
import time

from llm_analysis.analysis import DSZeRO, LLMAnalysis
from llm_analysis.config import GPUConfig, ModelConfig, ParallelismConfig

#: Source: meta-llama/Meta-Llama-3-70B config.json.
LLAMA = ModelConfig(
    name="llama-3-70b", num_layers=80, n_head=64, hidden_dim=8192, vocab_size=128256, max_seq_len=8192,
    num_key_value_heads=8, ffn_embed_dim=28672, expansion_ratio=3.5, model_type="llama",
)  # fmt: skip
# It refuses what does not fit before it says how much that is, so the card is without end.
GPU = GPUConfig(
    name="h100", mem_per_GPU_in_GB=10**5, hbm_bandwidth_in_GB_per_sec=3350, intra_node_bandwidth_in_GB_per_sec=900,
    intra_node_min_message_latency=8e-6, peak_fp16_TFLOPS=989,
)  # fmt: skip


def answer(tensor, pipeline, micro_batch):
    parallel = ParallelismConfig(tp_size=tensor, pp_size=pipeline, dp_size=2048 // (tensor * pipeline), sp_size=tensor)
    analysis = LLMAnalysis(LLAMA, GPU, parallelism_config=parallel, flops_efficiency=0.5, hbm_memory_efficiency=0.9)
    return analysis.training(
        batch_size_per_gpu=micro_batch,
        gradient_accumulation_steps=32,
        seq_len=4096,
        ds_zero=DSZeRO.STAGE_1,
        mlp_gated_linear_units=True,
    )


def main(seconds):
    logging.disable(logging.CRITICAL)
    grid = itertools.cycle(itertools.product((1, 2, 4, 8), (2, 4, 8, 16), (1, 2, 4)))
    with contextlib.redirect_stdout(io.StringIO()):
        result = answer(8, 8, 1)
        number, begin = 0, time.process_time()
        while time.process_time() - begin < seconds:
            answer(*next(grid))
            number += 1
        taken = time.process_time() - begin
    states = sum(result[f"{part}_memory_per_gpu"] for part in ("weight", "gradient", "optimizer_state"))
    figure = (states + result["activation_memory_per_gpu"]) / 2**30
    print(json.dumps({"number": number, "seconds": taken, "figures": {"llama-3-70b": figure}}))


main(float(sys.argv[2]))
