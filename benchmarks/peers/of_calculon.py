"""calculon: run by benchmarks/layouts.py with the folder of its source."""

import contextlib
import itertools
import json
import logging
import sys
import time
from pathlib import Path

FOLDER = Path(sys.argv[1])
sys.path.insert(0, str(FOLDER))

import calculon  # noqa: E402
from calculon.llm.llm import Llm  # noqa: E402
from calculon.system import System  # noqa: E402

#: Its words know no gated blocks, grouped queries or vocabulary: Llama-3-70B's sizes, else GPT's layer.
LLAMA = {
    "name": "llama", "hidden": 8192, "feedforward": 28672, "seq_size": 4096, "attn_heads": 64, "attn_size": 128,
    "num_blocks": 80,
}  # fmt: skip
SYSTEM = System(calculon.io.read_json_file(str(FOLDER / "systems" / "h100_80g_nvl8.json")))


def answer(tensor, pipeline, micro_batch):
    data = 2048 // (tensor * pipeline)
    execution = {
        "num_procs": 2048, "tensor_par": tensor, "pipeline_par": pipeline, "data_par": data, "tensor_par_net": 0,
        "pipeline_par_net": 1, "data_par_net": 1, "batch_size": 15360 // 15 * 32, "microbatch_size": micro_batch,
        "datatype": "float16", "fused_activation": True, "attention_type": "multihead", "activation_recompute": "none",
        "pipeline_interleaving": 1, "optimizer_sharding": True, "tensor_par_comm_type": "rs_ag",
        "tensor_par_overlap": "none", "seq_par_ag_redo": False, "data_par_overlap": False, "weight_offload": False,
        "activations_offload": False, "optimizer_offload": False, "training": True,
    }  # fmt: skip
    model = Llm(Llm.Application(LLAMA), logging.getLogger("calculon"))
    model.compile(SYSTEM, Llm.Execution.from_json(execution))
    with contextlib.suppress(Llm.Error):  # more than the card has: that is known only when all is worked out
        model.run(SYSTEM)
    return model.get_mem_tier1_cap_req()


def main(seconds):
    logging.disable(logging.CRITICAL)
    figure = answer(8, 8, 1)
    grid = itertools.cycle(itertools.product((1, 2, 4, 8), (2, 4, 8, 16), (1, 2, 4)))
    number, begin = 0, time.process_time()
    while time.process_time() - begin < seconds:
        answer(*next(grid))
        number += 1
    taken = time.process_time() - begin
    print(json.dumps({"number": number, "seconds": taken, "figures": {"llama-3-70b": figure / 2**30}}))


main(float(sys.argv[2]))
