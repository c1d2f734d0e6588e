"""Layouts per second: many at once and one with its ledger, beside other estimators of training memory.

    python benchmarks/layouts.py --cache ~/.cache/ullage-peers --write docs/layouts-speed.md

Under --cache each peer gets a virtual environment of its own, and its source where it is on no package index; what is
there already is taken as it is. A peer that cannot be had or fails gets a row that says so. Times are processor time of
one process; a peer is asked for layout after layout for some seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
import venv
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

GIB = 2**30
HERE = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Peer:
    """An estimator: what is installed from the package index, where its source is, what it is asked."""

    name: str
    driver: str
    packages: tuple[str, ...] = ()
    source: str = ""
    asked: str
    remark: str = ""


@dataclass(frozen=True, kw_only=True)
class Answer:
    version: str = ""
    per_second: float | None = None
    figures: dict[str, float] = field(default_factory=dict)
    remark: str = ""


PEERS = (
    Peer(
        name="Megatron-LM `report_theoretical_memory`",
        driver="of_megatron_formula.py",
        source="https://github.com/NVIDIA/Megatron-LM",
        asked="DeepSeek-V3",
        remark="one formula for all stages; activations of a dense model",
    ),
    Peer(
        name="llm-analysis",
        driver="of_llm_analysis.py",
        packages=("llm-analysis",),
        asked="Llama-3-70B",
        remark="no latent attention, no shared experts; time and memory",
    ),
    Peer(
        name="calculon",
        driver="of_calculon.py",
        packages=("numpy", "pandas", "psutil"),
        source="https://github.com/calculon-ai/calculon",
        asked="Llama-3-70B's sizes as a GPT",
        remark="no experts, gates, grouped queries or vocabulary; time and memory",
    ),
    Peer(
        name="SimuMax",
        driver="of_simumax.py",
        packages=("numpy", "pandas", "sympy", "matplotlib", "tabulate", "graphviz", "tqdm"),
        source="https://github.com/MooreThreads/SimuMax",
        asked="DeepSeek-V3",
        remark="first, middle and last stage; memory analysis alone, after its build of operators",
    ),
)


def ask(peer: Peer, cache: Path, seconds: float) -> Answer:
    """Install a peer if need be, and ask it."""
    short = peer.driver.removeprefix("of_").removesuffix(".py")
    folder, home = cache / f"{short}-source", cache / f"{short}-env"
    if peer.source and not folder.exists():
        done = run(["git", "clone", "-q", "--depth", "1", peer.source, folder])
        if done.returncode:
            return Answer(remark="its source could not be fetched: " + last_line(done.stderr))
    python = home / "bin" / "python"
    if not python.exists():
        venv.create(home, with_pip=True)
        done = run([python, "-m", "pip", "install", "-q", *peer.packages, "pip"])
        if done.returncode:
            return Answer(remark="does not install: " + last_line(done.stderr))
    command = [python, HERE / "peers" / peer.driver, folder, str(seconds)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600 + 10 * seconds, cwd=cache)
    except subprocess.TimeoutExpired:
        return Answer(version=version(peer, python, folder), remark="no answer in time")
    if done.returncode:
        return Answer(version=version(peer, python, folder), remark="fails: " + last_line(done.stderr))
    answer = json.loads(last_line(done.stdout))
    return Answer(
        version=version(peer, python, folder),
        per_second=answer["number"] / answer["seconds"],
        figures=answer["figures"],
        remark=peer.remark,
    )


def run(command: Sequence[str | Path]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True)


def version(peer: Peer, python: Path, folder: Path) -> str:
    if peer.source:
        command: list[str | Path] = ["git", "-C", folder, "log", "-1", "--format=%h (%as)"]
    else:
        code = f"from importlib.metadata import version; print(version({peer.packages[0]!r}))"
        command = [python, "-c", code]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


# ------------------------------------------------------------------------------------------------------------- our own


def own() -> dict[str, object]:
    """Time our own, in a process that has done nothing else: printed by --own, as JSON."""
    import numpy as np

    from ullage.engines import megatron
    from ullage.plan.layouts import SCHEDULES, grid
    from ullage.plan.sweep import evaluate
    from ullage.read.machine import parse_machine
    from ullage.read.model_source import load_model
    from ullage.spec.training import Precision, Recompute, TrainingJob, TrainingParallel
    from ullage.training_fit import judge

    machine = parse_machine("256x8xH800")
    bf16 = Precision(grads="float32", master="float32")
    v3, llama = load_model("deepseek-v3"), load_model("llama-3-70b")
    even = {"data_parallel_size": 128, "pipeline_parallel_size": 16, "expert_parallel_size": 64, "zero_stage": 1}
    layout = TrainingParallel(**even, pipeline_layout=(4,) * 15 + (1,))
    job = TrainingJob(model=v3, machine=machine, engine="megatron", parallel=layout, precision=bf16, grad_accum=120)
    dense = TrainingParallel(
        data_parallel_size=32, tensor_parallel_size=8, pipeline_parallel_size=8, sequence_parallel=True, zero_stage=1
    )
    times = []
    for _run in range(9):
        begin = time.process_time()
        ledger = judge(megatron.step(job), "20%")
        times.append(time.process_time() - begin)
    small = megatron.step(
        TrainingJob(model=llama, machine=machine, engine="megatron", parallel=dense, precision=bf16, grad_accum=32)
    )
    recomputes = (
        Recompute(),
        Recompute(kind="modules", modules=("layernorm", "mla_up_proj", "moe_act")),
        Recompute(kind="full"),
    )
    every = grid(
        2048,
        global_batch_size=15360,
        recomputes=recomputes,
        tensor_parallel_size=(1, 2, 4, 8),
        pipeline_parallel_size=(1, 2, 4, 8, 16, 32),
        virtual_pipeline_parallel_size=(1, 2, 4),
        context_parallel_size=(1, 2, 4),
        expert_parallel_size=(8, 16, 32, 64, 128, 256),
        expert_tensor_parallel_size=(1, 2),
        sequence_parallel=(0, 1),
        zero_stage=(0, 1),
        micro_batch_size=(1, 2, 4, 8),
        recompute=(0, 1, 2),
        schedule=tuple(SCHEDULES.index(name) for name in ("1f1b", "dualpipe", "dualpipev")),
    )
    chosen = every.take(np.sort(np.random.default_rng(0).choice(len(every), 100_000, replace=False)))
    template = TrainingJob(model=v3, machine=machine, engine="megatron", precision=bf16, loss="fused")
    sweeps = []
    for _run in range(3):
        begin = time.process_time()
        found = evaluate(template, chosen)
        sweeps.append(time.process_time() - begin)
    begin = time.process_time()
    evaluate(template, every)
    whole = time.process_time() - begin
    return {
        "whole": whole,
        "whole_number": len(every),
        "ledger_first": times[0],
        "ledger": min(times),
        "sweep_first": sweeps[0],
        "sweep": min(sweeps),
        "number": len(chosen),
        "legal": int(found.legal.sum()),
        "fits": int(found.fits.sum()),
        "figures": {
            "deepseek-v3": ledger.worst.peak.allocated.bytes / GIB,
            "llama-3-70b": max(rank.peak.allocated.bytes for rank in small.ranks) / GIB,
        },
    }


# ---------------------------------------------------------------------------------------------------------------- page


def row(cells: Sequence[object]) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def cells(name: str, asked: str, answer: Answer, ours: float) -> list[str]:
    figures = [f"{answer.figures[key]:.1f}" if key in answer.figures else "–" for key in ("deepseek-v3", "llama-3-70b")]
    if answer.per_second is None:
        return [f"{name} {answer.version}", asked, "–", "–", *figures, answer.remark]
    ratio = answer.per_second / ours
    speed = f"{answer.per_second:,.0f}" if answer.per_second >= 10 else f"{answer.per_second:.1f}"
    of_ours = f"{ratio:.2f}" if ratio > 0.1 else f"1/{1 / ratio:,.0f}"
    return [f"{name} {answer.version}", asked, speed, of_ours, *figures, answer.remark]


def page(mine: dict[str, float | dict[str, float]], peers: Sequence[tuple[Peer, Answer]]) -> str:
    """Return the page."""
    speed = mine["number"] / mine["sweep_first"]
    figures = mine["figures"]
    sweep = Answer(per_second=speed, figures=figures, remark="every class of ranks, to the byte of the ledger")
    one = Answer(per_second=1 / mine["ledger"], figures=figures, remark="every rank, every moment, every term")
    lines = [
        "# Layouts per second",
        "",
        "Made by `python benchmarks/layouts.py --write docs/layouts-speed.md`.",
        "",
        f"On {platform.python_implementation()} {platform.python_version()}, {os.cpu_count()} CPU cores, of which each "
        "takes one; processor time.",
        "",
        "**One ledger** of DeepSeek-V3 under PP 16 x EP 64 on 2,048 GPUs, all 16 ranks moment by moment: "
        f"{1000 * mine['ledger_first']:.0f} ms the first time in a process, {1000 * mine['ledger']:.0f} ms later.",
        "",
        f"**Many layouts** (`ullage.plan.sweep.evaluate`): {mine['number']:,} layouts of DeepSeek-V3 on 2,048 H800 (TP "
        "1-8, PP 1-32, VPP 1-4, CP 1-4, EP 8-256, ETP 1-2, sequence parallelism, ZeRO 0-1, micro-batches 1-8, three "
        "recomputes, three schedules; a sample of all that use every GPU) in "
        f"{mine['sweep_first']:.2f} s the first time, {mine['sweep']:.2f} s later: {speed:,.0f} a second. "
        f"{mine['legal']:,} of them can be, {mine['fits']:,} fit with the reserve free. What layouts share is "
        f"worked out once, so more cost little: all {mine['whole_number']:,} took {mine['whole']:.2f} s, "
        f"{mine['whole_number'] / mine['whole']:,.0f} a second.",
        "",
        row(["tool", "asked for", "layouts a second", "of ours", "DeepSeek-V3, GiB", "Llama-3-70B, GiB", "remark"]),
        row(["---"] * 7),
        row(cells("ullage, many at once", "DeepSeek-V3", sweep, speed)),
        row(cells("ullage, a ledger each", "DeepSeek-V3", one, speed)),
    ]
    lines += [row(cells(peer.name, peer.asked, answer, speed)) for peer, answer in peers]
    lines += [
        "",
        "The figures are the allocated peak of the fullest rank in bf16 with fp32 gradients and master weights, the "
        "optimizer sharded, nothing recomputed, sequences of 4,096, micro-batch 1, on 2,048 GPUs: DeepSeek-V3 under PP "
        "16 (four layers a stage, one on the last) x EP 64, Llama-3-70B under TP 8 x PP 8 with sequence parallelism. "
        "Megatron-LM's formula counts selective recompute there, has no experts among activations and spreads layers "
        "evenly. SimuMax keeps experts' outputs until they are weighted, as Megatron-LM did before its "
        "memory-efficient permutation: 60 layers in flight x 448 MiB = 26.2 GiB, all but 0.3 GiB of the difference.",
        "",
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="layouts per second of ullage and its peers")
    parser.add_argument("--cache", type=Path, help="folder for the peers' environments, outside the repository")
    parser.add_argument("--seconds", type=float, default=10.0, help="for which each peer is asked")
    parser.add_argument("--write", type=Path, help="write the page here; otherwise it is printed")
    parser.add_argument("--own", action="store_true", help="print our own figures as JSON")
    arguments = parser.parse_args()
    if arguments.own:
        print(json.dumps(own()))
        return 0
    done = subprocess.run([sys.executable, __file__, "--own"], capture_output=True, text=True, check=True)
    mine = json.loads(done.stdout)
    peers = []
    if arguments.cache:
        cache = arguments.cache.expanduser().resolve()
        cache.mkdir(parents=True, exist_ok=True)
        peers = [(peer, ask(peer, cache, arguments.seconds)) for peer in PEERS]
    text = page(mine, peers)
    if arguments.write:
        arguments.write.write_text(text)
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
