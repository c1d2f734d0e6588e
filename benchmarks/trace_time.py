"""How long a traced step takes, beside PyTorch's own memory tracker.

    python benchmarks/trace_time.py [--layers 8 16] [--full]

Times a training step (AdamW, no recompute) of Llama-3.1-70B width cut to some layers: ``ullage.trace`` with every layer
run, with repeated layers unrolled, and ``torch.distributed._tools.mem_tracker.MemTracker`` on fake CPU tensors.
``--full`` adds Llama-3.1-70B and DeepSeek-V3 whole, with recompute. Each runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

WIDTH = {
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
GIB = 2**30


def config_of(layers: int):
    from transformers import AutoConfig

    values = dict(WIDTH, num_hidden_layers=layers)
    return AutoConfig.for_model(values.pop("model_type"), **values)


def ours(target: str, unroll: bool, recompute: str) -> dict[str, float]:
    from ullage.trace.api import trace

    if target.isdigit():
        import torch
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            made = AutoModelForCausalLM.from_config(config_of(int(target)), dtype=torch.bfloat16)
    else:
        made = target
    found = trace(made, steps=1, engine="plain", recompute=recompute, unroll=unroll)
    return {"allocated_gib": found.peak_allocated_bytes / GIB, "reserved_gib": found.peak_reserved_bytes / GIB}


def theirs(layers: int) -> dict[str, float]:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.mem_tracker import MemTracker
    from transformers import AutoModelForCausalLM

    with FakeTensorMode():
        with torch.device("cpu"):
            config = config_of(layers)
            config.use_cache = False
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="eager")
            optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
            tokens = torch.zeros(1, 4096, dtype=torch.long)
            mask = torch.zeros(1, 1, 4096, 4096, dtype=torch.bfloat16)
        tracker = MemTracker()
        tracker.track_external(model, optimizer)
        with tracker:
            hidden = model(input_ids=tokens, labels=tokens, attention_mask=mask)
            hidden.loss.backward()
            optimizer.step()
        peak = tracker.get_tracker_snapshot("peak")
    return {"allocated_gib": sum(each["Total"] for each in peak.values()) / GIB}


def measure(words: list[str]) -> dict[str, float]:
    done = subprocess.run([sys.executable, __file__, "--one", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1][:150]}  # type: ignore[dict-item]
    return json.loads(done.stdout.splitlines()[-1])


def one(words: list[str]) -> None:
    started = time.perf_counter()
    kind, target, recompute = words
    found = theirs(int(target)) if kind == "MemTracker" else ours(target, kind == "unrolled", recompute)
    found["seconds"] = time.perf_counter() - started
    found["host_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
    print(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        one(arguments.one)
        return
    rows = [(kind, str(layers), "none") for layers in arguments.layers for kind in ("MemTracker", "all layers")]
    rows += [("unrolled", str(layers), "none") for layers in arguments.layers if layers > 9]
    if arguments.full:
        rows += [
            (kind, name, "full") for name in ("llama-3.1-70b", "deepseek-v3") for kind in ("all layers", "unrolled")
        ]
    print(
        f"{'':12} {'model':>14} {'seconds':>8} {'host GiB':>9} {'allocated':>10} {'reserved':>10}   (imports included)"
    )
    for row in rows:
        found = measure(list(row))
        if "failed" in found:
            print(f"{row[0]:12} {row[1]:>14} {found['failed']}")
            continue
        print(
            f"{row[0]:12} {row[1]:>14} {found['seconds']:8.1f} {found['host_gib']:9.2f} {found['allocated_gib']:10.2f} "
            f"{found.get('reserved_gib', 0):10.2f}"
        )


if __name__ == "__main__":
    main()
