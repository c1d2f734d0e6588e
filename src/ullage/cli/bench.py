"""``ullage bench train|serve``: what this machine really takes: idle, full load, changing load."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ullage.cli.fit import COUNT, SIZE
from ullage.errors import EXIT_DOES_NOT_FIT, EXIT_OK, InputError
from ullage.i18n import _

if TYPE_CHECKING:
    from ullage.bench.outcome import BenchResult


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    kinds = parser.add_subparsers(dest="kind", metavar="train|serve", required=True)
    train = kinds.add_parser("train", allow_abbrev=False, help=_("training steps on this machine's devices"))
    serve = kinds.add_parser("serve", allow_abbrev=False, help=_("an endpoint that speaks OpenAI's API"))
    _add_train(train)
    _add_serve(serve)
    for each in (train, serve):
        each.add_argument("--idle", type=float, default=2.0, metavar="SECONDS", help=_("of the idle phase (2)"))
        each.add_argument("--json", action="store_true", help=_("print JSON (see ullage schema bench)"))
        each.add_argument("--html", type=Path, metavar="FILE", help=_("write a page with the curves"))
        each.add_argument("--records", type=Path, metavar="FILE", help=_("append records for ullage validate"))


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what", metavar="CONFIG|MODULE:FUNCTION", help=_("config.json of a Transformers model, or a function (docs)")
    )
    parser.add_argument("--seq", type=COUNT, default=512, metavar="TOKENS", help=_("longest sequence (512)"))
    parser.add_argument("--micro-batch", type=COUNT, default=1, metavar="N", help=_("where the search starts (1)"))
    parser.add_argument("--max-batch", type=COUNT, default=4096, metavar="N", help=_("where the search ends (4096)"))
    parser.add_argument("--no-search", action="store_true", help=_("run --micro-batch alone"))
    parser.add_argument("--layers", type=COUNT, metavar="N", help=_("decoder layers, instead of the config's"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=_("another key of the config"))
    parser.add_argument("--dtype", choices=("bf16", "fp32", "bf16-mixed"), default="bf16", help=_("number format"))
    parser.add_argument("--optimizer", choices=("adamw", "sgd"), default="adamw", help=_("optimizer of torch"))
    parser.add_argument("--recompute", action="store_true", help=_("checkpoint every decoder layer"))
    parser.add_argument("--lora", type=COUNT, metavar="RANK", help=_("train adapters on all linear layers"))
    parser.add_argument("--grad-accum", type=COUNT, default=1, metavar="N", help=_("passes per optimizer step"))
    parser.add_argument("--steps", type=COUNT, default=10, metavar="N", help=_("of the full-load phase (10)"))
    parser.add_argument("--device", choices=("cuda", "cpu"), help=_("cuda where there is one"))
    parser.add_argument("--memory-limit", type=SIZE, metavar="SIZE", help=_("what one process may take"))
    parser.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help=_("of one try (600)"))


def _add_serve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", metavar="URL", help=_("such as http://localhost:8000"))
    parser.add_argument("--model", metavar="NAME", help=_("as the endpoint calls it (the first that it lists)"))
    parser.add_argument("--api", choices=("completions", "chat"), default="completions", help=_("which endpoint"))
    parser.add_argument("--api-key", metavar="NAME", help=_("environment variable that holds the key"))
    parser.add_argument("--prompt-tokens", type=COUNT, default=128, metavar="N", help=_("longest prompt (128)"))
    parser.add_argument("--output-tokens", type=COUNT, default=32, metavar="N", help=_("per request (32)"))
    parser.add_argument("--word", default="hello", help=_("prompts repeat this word: one token each is best (hello)"))
    parser.add_argument("--concurrency", type=COUNT, default=1, metavar="N", help=_("where the search starts (1)"))
    parser.add_argument("--max-concurrency", type=COUNT, default=256, metavar="N", help=_("where it ends (256)"))
    parser.add_argument("--requests", type=COUNT, default=8, metavar="N", help=_("of each try, at least (8)"))
    parser.add_argument("--max-ttft", type=float, metavar="SECONDS", help=_("a slower first token (p95) is a failure"))
    parser.add_argument("--max-gap", type=float, metavar="SECONDS", help=_("a slower next token (p95) is a failure"))
    parser.add_argument("--past-knee", action="store_true", help=_("go on where more requests bring no more tokens/s"))
    parser.add_argument("--timeout", type=float, default=120.0, metavar="SECONDS", help=_("of one request (120)"))
    memory = parser.add_mutually_exclusive_group()
    memory.add_argument(
        "--pid", type=COUNT, metavar="PID", help=_("server on this host: resident set of its processes")
    )
    memory.add_argument("--nvml", metavar="0,1|all", help=_("server on this host: these devices by NVML"))
    memory.add_argument("--recording", type=Path, metavar="FILE", help=_("written by ullage watch meanwhile"))
    parser.add_argument("--gpu", metavar="NAME", help=_("for the records: which card, such as H200"))
    parser.add_argument("--num-gpus", type=COUNT, default=1, metavar="N", help=_("for the records"))
    parser.add_argument("--engine", metavar="NAME@VERSION", help=_("for the records: which engine serves"))


def run(arguments: argparse.Namespace) -> int:
    """Run the command; 3 when not even the smallest load lives."""
    result = _train(arguments) if arguments.kind == "train" else _serve(arguments)
    if result is None:  # another rank prints
        return EXIT_OK
    if arguments.records is not None:
        from ullage.bench.records import write_records

        write_records(arguments.records, result)
    if arguments.html is not None:
        from ullage.report.bench_html import write_bench_page

        write_bench_page(arguments.html, result)
    if arguments.json:
        from ullage.cli import print_json
        from ullage.report.bench_json import bench_json

        print_json(bench_json(result))
    else:
        from ullage.report.bench_text import print_bench

        print_bench(result)
    lives = result.break_point is None or result.break_point.largest >= 1
    return EXIT_OK if lives else EXIT_DOES_NOT_FIT


def say(sentence: str) -> None:
    """Tell a person at a terminal what is under way."""
    if sys.stderr.isatty():
        print(f"ullage bench: {sentence}", file=sys.stderr)


def _train(arguments: argparse.Namespace) -> BenchResult | None:
    from ullage.bench.ranks import ranks_here
    from ullage.bench.target import Target
    from ullage.bench.train import TrainBench, bench_train

    target = Target(
        what=arguments.what,
        layers=arguments.layers,
        overrides=tuple(_pair(word) for word in arguments.set),
        dtype=arguments.dtype,
        optimizer=arguments.optimizer,
        recompute=arguments.recompute,
        lora=arguments.lora or 0,
        grad_accum=arguments.grad_accum,
    )
    asked = TrainBench(
        target=target,
        device=_device(arguments.device),
        seq=arguments.seq,
        first_batch=arguments.micro_batch,
        max_batch=max(arguments.max_batch, arguments.micro_batch),
        search=not arguments.no_search,
        steps=arguments.steps,
        idle_seconds=_positive(arguments.idle, "--idle"),
        timeout=_positive(arguments.timeout, "--timeout"),
        memory_limit_bytes=arguments.memory_limit,
    )
    ranks = ranks_here()
    result = bench_train(asked, ranks, say if ranks.rank == 0 else lambda _sentence: None)
    return result if ranks.rank == 0 else None


def _device(asked: str | None) -> str:
    """Return the device; torch is asked in this process without making a context."""
    from ullage.errors import MissingExtraError

    try:
        import torch
    except ImportError:
        raise MissingExtraError("torch", "torch") from None
    found = torch.cuda.is_available()
    if asked == "cuda" and not found:
        raise InputError(_("no CUDA device was found"), where="--device cuda", remedy=_("use --device cpu"))
    return asked or ("cuda" if found else "cpu")


def _pair(word: str) -> tuple[str, Any]:
    import json

    key, equals, text = word.partition("=")
    if not equals or not key:
        raise InputError(_("{word!r} is not KEY=VALUE").format(word=word[:60]), where="--set")
    try:
        return key, json.loads(text)
    except ValueError:
        return key, text


def _positive(value: float, where: str) -> float:
    if not 0 < value < 1e6:
        raise InputError(_("{value} cannot be used").format(value=value), where=where, remedy=_("give seconds"))
    return value


def _serve(arguments: argparse.Namespace) -> BenchResult:
    from ullage.bench.serve import ServeBench, bench_serve

    asked = ServeBench(
        url=arguments.url,
        model=arguments.model,
        api=arguments.api,
        key_variable=arguments.api_key,
        prompt_tokens=arguments.prompt_tokens,
        output_tokens=arguments.output_tokens,
        word=arguments.word,
        first=arguments.concurrency,
        cap=max(arguments.max_concurrency, arguments.concurrency),
        requests=arguments.requests,
        max_ttft=arguments.max_ttft,
        max_gap=arguments.max_gap,
        knee=not arguments.past_knee,
        timeout=_positive(arguments.timeout, "--timeout"),
        idle_seconds=_positive(arguments.idle, "--idle"),
        pid=arguments.pid,
        nvml=arguments.nvml,
        recording=arguments.recording,
        gpu=arguments.gpu,
        num_gpus=arguments.num_gpus,
        engine=arguments.engine,
    )
    return bench_serve(asked, say)
