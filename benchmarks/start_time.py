"""Whole-process time and figures of `ullage fit serve`, beside other calculators that install from PyPI.

    python benchmarks/start_time.py --cache ~/.cache/ullage-peers --write docs/benchmarks.md

Each peer gets a virtual environment of its own under --cache. A peer that cannot answer (it needs the network, or
fails on the model) gets a row that says so. Times are whole processes, best of a number of runs; what is compared is
the ratio to an empty Python process on the same machine, which carries over to other machines better than seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

GIB = 2**30
CONTEXT = 32_768
#: What a DeepSeek-V3 checkpoint says of itself, for peers that read a config.json.
#: Source: deepseek-ai/DeepSeek-V3 on the Hugging Face hub, config.json.
DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "attention_bias": False,
    "hidden_act": "silu",
    "max_position_embeddings": 163840,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 129280,
    "quantization_config": {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "weight_block_size": [128, 128],
    },
}


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A calculator: how it is installed, asked, and read. ``{folder}`` is a folder with the config.json."""

    package: str
    command: str
    weights: str | None = None
    kv_cache: str | None = None
    scope: str
    remark: str = ""


@dataclass(frozen=True, kw_only=True)
class Answer:
    seconds: float | None
    weights_gib: float | None = None
    kv_cache_gib: float | None = None
    remark: str = ""
    version: str = ""


PEERS = (
    Peer(
        package="llm-mem-planner",
        command=f"llm-mem-planner --config {{folder}}/config.json --seq-len {CONTEXT} --batch 1 --tp 8 "
        "--weight-dtype fp8",
        weights=r"weights_per_rank:\s*([\d.]+) GiB",
        kv_cache=r"kv_per_rank=([\d.]+) GiB",
        scope="one of 8 ranks",
    ),
    Peer(
        package="hf-vram-calc",
        command="hf-vram-calc --model deepseek-ai/DeepSeek-V3 --model_path {folder} --dtype fp8 "
        f"--max_seq_len {CONTEXT} --max_batch_size 1",
        weights=r"│\s*FP8\s*│\s*([\d.]+)\s*│",
        kv_cache=r"│\s*FP8\s*│\s*[\d.]+\s*│\s*[\d.]+\s*│\s*([\d.]+)",
        scope="whole model",
    ),
    Peer(
        package="aiconfigurator",
        command="aiconfigurator cli estimate --model-path deepseek-ai/DeepSeek-V3 --system h200_sxm --backend vllm "
        f"--isl {CONTEXT} --osl 1 --batch-size 1 --tp-size 8 --moe-tp-size 1 --moe-ep-size 8 --estimate-mode static",
        scope="one of 8 ranks",
        remark=r"Memory \(GPU\):\s*([\d.]+ \w+)",
    ),
    Peer(
        package="hf-mem",
        command=f"hf-mem --model-id deepseek-ai/DeepSeek-V3 --experimental --max-model-len {CONTEXT} --json-output",
        scope="whole model",
    ),
)


def compiled() -> dict[str, str]:
    """Return an environment in which Python keeps compiled modules, as it does after an installation."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, "COLUMNS": "160", "NO_COLOR": "1"}


def best_seconds(command: Sequence[str], runs: int) -> float:
    """Return the shortest whole-process time of ``command``."""
    times = []
    for _run in range(runs):
        begin = time.perf_counter()
        subprocess.run(command, capture_output=True, timeout=300, env=compiled())
        times.append(time.perf_counter() - begin)
    return min(times)


def ask(peer: Peer, cache: Path, folder: Path, runs: int) -> Answer:
    """Install a peer if need be, run it, and read its figures."""
    home = cache / peer.package
    python = home / "bin" / "python"
    if not python.exists():
        venv.create(home, with_pip=True)
    if subprocess.run([python, "-m", "pip", "show", "-q", peer.package], capture_output=True).returncode:
        done = subprocess.run([python, "-m", "pip", "install", "-q", peer.package], capture_output=True, text=True)
        if done.returncode:
            return Answer(seconds=None, remark="does not install: " + last_line(done.stderr))
    shown = subprocess.run([python, "-m", "pip", "show", peer.package], capture_output=True, text=True).stdout
    version = (re.search(r"^Version: (\S+)", shown, re.MULTILINE) or ["", "?"])[1]
    program, *arguments = (word.format(folder=folder) for word in peer.command.split())
    command = [str(home / "bin" / program), *arguments]
    begin = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=compiled(), cwd=folder)
    except subprocess.TimeoutExpired:
        return Answer(seconds=None, remark="no answer within 300 s", version=version)
    seconds = time.perf_counter() - begin
    if done.returncode:
        return Answer(seconds=None, remark=reason(done.stderr or done.stdout), version=version)
    if runs > 1:
        seconds = min(seconds, best_seconds(command, runs - 1))
    remark = found(peer.remark, done.stdout) if peer.remark else None
    return Answer(
        seconds=seconds,
        weights_gib=gib(peer.weights, done.stdout),
        kv_cache_gib=gib(peer.kv_cache, done.stdout),
        remark=f"one figure for all: {remark}" if remark else "",
        version=version,
    )


def found(pattern: str | None, text: str) -> str | None:
    match = re.search(pattern, text) if pattern else None
    return match.group(1) if match else None


def gib(pattern: str | None, text: str) -> float | None:
    digits = found(pattern, text)
    return float(digits) if digits else None


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:120] if lines else ""


def reason(text: str) -> str:
    network = re.search(r"ConnectError|ConnectionError|Name or service not known|Max retries", text)
    return "needs the network, which was not there" if network else "fails: " + last_line(text)


def ours(runs: int) -> tuple[Answer, float]:
    """Return our answer (one of 8 ranks), and the time of an empty Python process."""
    command = [sys.executable, "-m", "ullage", "fit", "serve", "deepseek-v3", "--on", "8xH200", "--engine", "vllm"]
    command += ["--tp", "8", "--context", str(CONTEXT), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=compiled())
    if done.returncode not in (0, 3, 4):  # the exit code of an answer is its verdict
        raise SystemExit(done.stderr)
    answer = json.loads(done.stdout)
    serving = answer["serving"]
    cache = serving["kv_bytes_per_token"] * CONTEXT + serving["kv_fixed_bytes_per_request"]
    own = Answer(
        seconds=best_seconds(command, runs),
        weights_gib=serving["weights_bytes"] / GIB,
        kv_cache_gib=cache / GIB,
        remark=f"verdict: {answer['verdict']}",
        version=subprocess.run(
            [sys.executable, "-c", "import ullage; print(ullage.__version__)"], capture_output=True, text=True
        ).stdout.strip(),
    )
    return own, best_seconds([sys.executable, "-c", "pass"], runs)


def row(cells: Sequence[object]) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def cells(name: str, scope: str, answer: Answer, empty: float) -> list[str]:
    return [
        f"{name} {answer.version}",
        scope,
        "–" if answer.seconds is None else f"{answer.seconds:.2f} s",
        "–" if answer.seconds is None else f"{answer.seconds / empty:.1f} ×",
        "–" if answer.weights_gib is None else f"{answer.weights_gib:.2f}",
        "–" if answer.kv_cache_gib is None else f"{answer.kv_cache_gib:.3f}",
        answer.remark,
    ]


def page(own: Answer, empty: float, peers: Sequence[tuple[Peer, Answer]]) -> str:
    """Return docs/benchmarks.md."""
    lines = [
        "# Benchmarks",
        "",
        "Made by `python benchmarks/start_time.py --write docs/benchmarks.md`.",
        "",
        "## Time to an answer, and the answer",
        "",
        f"DeepSeek-V3 (fp8) on 8 x H200, one request of {CONTEXT:,} tokens. Whole processes, best of several runs, on "
        f"{platform.python_implementation()} {platform.python_version()}, {os.cpu_count()} CPU cores. An empty Python "
        f"process (`python -c pass`) took {empty:.3f} s; the ratio to it is what carries over to other machines. "
        "Weights and KV cache are in GiB, for what the column *of* says. Peers are asked for fp8 weights with the "
        "options that their own help gives; a cell without a figure means that the tool prints none.",
        "",
        row(["tool", "of", "time", "× empty Python", "weights, GiB", "KV cache, GiB", "remark"]),
        row(["---"] * 7),
        row(cells("ullage", "one of 8 ranks", own, empty)),
    ]
    lines += [row(cells(peer.package, peer.scope, answer, empty)) for peer, answer in peers]
    lines += [
        "",
        "What to check the figures by: DeepSeek-V3 caches one latent of 512 + 64 elements per token and layer "
        f"(arXiv:2405.04434, section 2.1), so {CONTEXT:,} tokens in bfloat16 are 61 x 576 x 2 x {CONTEXT:,} = "
        f"{61 * 576 * 2 * CONTEXT / GIB:.3f} GiB, on every tensor-parallel rank: the latent has no heads to split.",
        "",
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="time and figures of ullage and its peers")
    parser.add_argument("--cache", type=Path, help="folder for the peers' environments, outside the repository")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--write", type=Path, help="write the page here; otherwise it is printed")
    arguments = parser.parse_args()
    own, empty = ours(arguments.runs)
    answers: list[tuple[Peer, Answer]] = []
    if arguments.cache:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(DEEPSEEK_V3))
            cache = arguments.cache.expanduser().resolve()
            answers = [(peer, ask(peer, cache, Path(folder), arguments.runs)) for peer in PEERS]
    text = page(own, empty, answers)
    if arguments.write:
        arguments.write.write_text(text)
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
