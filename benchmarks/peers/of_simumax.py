"""SimuMax: run by benchmarks/layouts.py with the folder of its source, its memory analysis alone."""

import contextlib
import io
import itertools
import json
import logging
import re
import sys
import time
import warnings
from pathlib import Path

FOLDER = Path(sys.argv[1])
sys.path.insert(0, str(FOLDER))
warnings.filterwarnings("ignore")

from simumax.core.config import ModelConfig, StrategyConfig, SystemConfig  # noqa: E402
from simumax.core.perf_llm import PerfLLM  # noqa: E402

CONFIGS = FOLDER / "configs"
UNITS = {"B": 2**-30, "KB": 2**-20, "MB": 2**-10, "GB": 1.0, "TB": 2.0**10}


def strategy(layers, tensor, pipeline, expert, micro_batch):
    """The last stage takes what even stages leave over."""
    each = -(-layers // pipeline)
    uneven = {} if layers % pipeline == 0 else {
        "num_layers_in_first_pipeline_stage": each,
        "num_layers_in_last_pipeline_stage": layers - each * (pipeline - 1),
    }  # fmt: skip
    return uneven | {
        "seq_len": 4096, "micro_batch_size": micro_batch, "micro_batch_num": 32, "dtype": "bf16", "world_size": 2048,
        "tp_size": tensor, "pp_size": pipeline, "ep_size": expert, "etp_size": 1, "moe_dispatcher_policy": "all2all",
        "enable_sequence_parallel": True, "interleaving_size": 1, "zero_state": 1, "enable_dropout": False,
        "use_fused_norm": True, "use_math_sdp": False, "use_flash_sdp": True, "use_fp32_accum_grad": True,
        "enable_recompute": False, "mem_factor": 0.94,
    }  # fmt: skip


def answer(model, tensor, pipeline, expert, micro_batch):
    sizes = ModelConfig.init_from_config_file(str(CONFIGS / "models" / f"{model}.json"))
    perf = PerfLLM()
    perf.configure(
        strategy_config=StrategyConfig(**strategy(sizes.layer_num, tensor, pipeline, expert, micro_batch)),
        model_config=sizes,
        system_config=SystemConfig.init_from_config_file(str(CONFIGS / "system" / "b200_bf16_ceperm.json")),
    )
    perf.run_estimate()
    return perf.analysis_mem()


def peaks(value):
    """Yield the peaks that its result names, in GiB, as numbers or as text with a unit."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "peak_mem":
                match = re.fullmatch(r"\s*([\d.]+)\s*(\w+)\s*", str(inner))
                yield float(match.group(1)) * UNITS[match.group(2)] if match else float(inner) / 2**30
            else:
                yield from peaks(inner)


def main(seconds):
    logging.disable(logging.CRITICAL)
    with contextlib.redirect_stdout(io.StringIO()):
        figures = {
            "deepseek-v3": max(peaks(answer("deepseekv3", 1, 16, 64, 1).data)),
            "llama-3-70b": max(peaks(answer("llama3-70b", 8, 8, 1, 1).data)),
        }
        grid = itertools.cycle(itertools.product((1,), (4, 8, 16), (16, 32, 64), (1, 2)))
        number, begin = 0, time.process_time()
        while time.process_time() - begin < seconds:
            answer("deepseekv3", *next(grid))
            number += 1
        taken = time.process_time() - begin
    print(json.dumps({"number": number, "seconds": taken, "figures": figures}))


main(float(sys.argv[2]))
