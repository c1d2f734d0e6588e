"""``ullage trace TARGET``: run a step on meta tensors and say what memory it takes, tensor by tensor."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ullage.errors import EXIT_DOES_NOT_FIT, EXIT_OK
from ullage.i18n import _


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    from ullage.trace.job import DTYPES, ENGINES, IMPLEMENTATIONS, OPTIMIZERS

    parser.add_argument("target", metavar="TARGET", help=_("a model, its config.json, or your module:function"))
    step = parser.add_argument_group(_("the step"))
    step.add_argument("--micro-batch", type=int, default=1, metavar="N", help=_("sequences per pass (1)"))
    step.add_argument("--seq", type=int, default=4096, metavar="N", help=_("tokens per sequence (4096)"))
    step.add_argument("--grad-accum", type=int, default=1, metavar="N", help=_("passes per optimizer step (1)"))
    step.add_argument("--steps", type=int, default=2, metavar="N", help=_("optimizer steps (2)"))
    step.add_argument("--inference", action="store_true", help=_("one forward pass without gradients"))
    step.add_argument("--engine", choices=ENGINES, default="hf", help=_("hf: as the Trainer; plain: as a plain loop"))
    step.add_argument("--dtype", choices=DTYPES, default="bf16", help=_("of the parameters (bf16)"))
    step.add_argument("--autocast", choices=DTYPES, help=_("compute in this dtype under torch.autocast"))
    step.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw", help=_("the optimizer (adamw)"))
    step.add_argument("--optimizer-impl", choices=IMPLEMENTATIONS, help=_("its implementation"))
    step.add_argument("--clip", action=argparse.BooleanOptionalAction, help=_("clip gradients (hf does)"))
    step.add_argument("--recompute", choices=("none", "full"), default="none", help=_("activation checkpointing"))
    step.add_argument(
        "--lora", metavar="r=16,...", help=_("adapters through PEFT: r=16,alpha=32,targets=q_proj+v_proj")
    )
    _add_base(parser)
    ranks = parser.add_argument_group(_("the ranks"))
    ranks.add_argument("--fsdp", type=int, default=0, metavar="N", help=_("shard every layer over N ranks (FSDP2)"))
    ranks.add_argument("--no-reshard", action="store_true", help=_("keep gathered parameters after forward (FSDP2)"))
    ranks.add_argument("--tp", type=int, default=0, metavar="N", help=_("split matrices over N ranks"))
    ranks.add_argument("--sp", action="store_true", help=_("split sequence and loss over them too, as torchtitan"))
    ranks.add_argument("--ddp", type=int, default=0, metavar="N", help=_("replicas on N ranks (DDP)"))
    ranks.add_argument(
        "--world", type=int, default=0, metavar="N", help=_("a fake process group of N ranks for your module:function")
    )
    ranks.add_argument("--rank", type=int, default=0, metavar="R", help=_("which rank to trace (0)"))
    kernels = parser.add_argument_group(_("the device"))
    kernels.add_argument("--on", metavar="GPU", help=_("the GPU: its kernels, and whether it fits (H100's kernels)"))
    kernels.add_argument(
        "--attention",
        default="auto",
        choices=("auto", "eager", "flash", "efficient", "cudnn", "math"),
        help=_("the kernel of attention"),
    )
    kernels.add_argument("--routing-skew", type=float, default=0.0, metavar="X", help=_("0: experts are used equally"))
    kernels.add_argument("--settings", default="", metavar="CONF", help=_("PYTORCH_ALLOC_CONF of the run"))
    kernels.add_argument("--torch", default="2.13", metavar="VERSION", help=_("the PyTorch of the settings (2.13)"))
    shown = parser.add_argument_group(_("the answer"))
    shown.add_argument("--stacks", action="store_true", help=_("take Python stacks"))
    shown.add_argument("--no-unroll", action="store_true", help=_("run every layer, also those that repeat"))
    shown.add_argument("--largest", type=int, default=12, metavar="N", help=_("tensors listed (12)"))
    shown.add_argument("--html", type=Path, metavar="FILE", help=_("write a page"))
    shown.add_argument("--snapshot", type=Path, metavar="FILE", help=_("write a memory snapshot of PyTorch"))
    shown.add_argument("--json", action="store_true", help=_("print JSON"))


def _add_base(parser: argparse.ArgumentParser) -> None:
    """Declare how a frozen base is held."""
    from ullage.trace.job import BASES, PREPARATIONS

    base = parser.add_argument_group(_("a quantised base under adapters"))
    base.add_argument("--base", choices=BASES, help=_("its linear layers: nf4, fp4 (bitsandbytes) or gptq, 4 bits"))
    base.add_argument("--no-double-quant", action="store_true", help=_("scales of nf4 and fp4 are fp32"))
    base.add_argument("--group-size", type=int, default=128, metavar="N", help=_("of gptq, 0: no groups (128)"))
    base.add_argument(
        "--prepare",
        choices=PREPARATIONS,
        default="trl",
        help=_("what the trainer makes fp32: trl norms, peft all (trl)"),
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the command; 3 when the reserved peak exceeds the memory of the GPU given."""
    from ullage.trace.api import trace

    gpu = None
    options = _options(arguments)
    if arguments.on:
        from ullage.read.machine import parse_machine

        gpu = parse_machine(arguments.on).gpu
        options["compute_capability"] = gpu.compute_capability or (9, 0)
    result = trace(
        arguments.target,
        settings=arguments.settings,
        torch_version=arguments.torch,
        stacks=arguments.stacks,
        **options,
    )
    if arguments.snapshot is not None:
        from ullage.trace.snapshot import write_snapshot

        write_snapshot(arguments.snapshot, result.trace, result.outcome.settings, text=arguments.settings)
    if arguments.html is not None:
        from ullage.report.trace_html import write_trace_page

        write_trace_page(arguments.html, result)
    _print(result, arguments)
    return EXIT_OK if gpu is None or result.peak_reserved_bytes <= gpu.total_bytes else EXIT_DOES_NOT_FIT


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    same = (
        "micro_batch", "grad_accum", "steps", "inference", "engine", "dtype", "autocast", "optimizer", "optimizer_impl",
        "clip", "recompute", "lora", "base", "prepare", "group_size", "attention", "routing_skew", "fsdp", "ddp",
        "world", "tp", "sp", "rank",
    )  # fmt: skip
    options = {name: getattr(arguments, name) for name in same}
    return options | {
        "seq_len": arguments.seq,
        "nested": not arguments.no_double_quant,
        "unroll": not arguments.no_unroll,
        "reshard_after_forward": not arguments.no_reshard,
    }


def _print(result: Any, arguments: argparse.Namespace) -> None:
    if arguments.json:
        from ullage.cli import print_json
        from ullage.report.trace_json import trace_json

        print_json(trace_json(result))
        return
    from ullage.report.trace_text import print_trace

    print_trace(result, largest=max(0, arguments.largest))
    for path in (arguments.html, arguments.snapshot):
        if path is not None:
            print(_("wrote {path}").format(path=path), file=sys.stderr)
