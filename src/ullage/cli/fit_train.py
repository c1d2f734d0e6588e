"""``ullage fit train MODEL --on MACHINE``: one optimizer step, the fullest rank at its worst moment."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ullage.cli.fit import COUNT
from ullage.cli.words import other_names
from ullage.errors import InputError
from ullage.i18n import _

if TYPE_CHECKING:
    from ullage.spec.machine import Machine
    from ullage.spec.training import FsdpSharding, TrainingJob, TrainingParallel
    from ullage.training_fit import TrainingFit

DEFAULT_SEQ_LEN = 4096
#: Frameworks whose batches are padded as a rule: SDPA gets a mask then, and keys and values repeated for every head.
MASKED = ("hf_trainer", "single", "ddp", "unsloth")
#: What the frameworks call the same; not listed, so that the help stays short.
OTHER_NAMES = {
    "--tensor-model-parallel-size": "tp", "--tensor-parallel-size": "tp", "--pipeline-model-parallel-size": "pp",
    "--pipeline-parallel-size": "pp", "--context-parallel-size": "cp", "--expert-model-parallel-size": "ep",
    "--expert-tensor-parallel-size": "etp", "--data-parallel-size": "dp", "--micro-batch-size": "micro_batch",
    "--per-device-train-batch-size": "micro_batch", "--seq-length": "seq", "--seq-len": "seq",
    "--gradient-accumulation-steps": "grad_accum", "--sequence-parallel": "sp",
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.usage = (
        "ullage fit train MODEL --on MACHINE [options]\n"
        "       ullage fit train [MODEL] --from ENGINE:FILE --on MACHINE [options]"
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help=_("name, folder, config.json or hub id"))
    parser.add_argument("--on", metavar="MACHINE", help=_("such as 8xH100, 256x8xH800 (256 nodes of 8)"))
    parser.add_argument("--engine", metavar="NAME", help=_("megatron, fsdp2, deepspeed, hf_trainer, unsloth ..."))
    parser.add_argument(
        "--from",
        dest="line",
        metavar="ENGINE:FILE",
        help=_(
            "megatron, torchtitan, torchtune, litgpt, deepspeed, accelerate, trainer, trl, llamafactory, axolotl, swift"
        ),
    )
    _add_layout(parser.add_argument_group(_("layout")))
    _add_step(parser.add_argument_group(_("step")))
    types = dict.fromkeys(("tp", "pp", "cp", "ep", "etp", "dp", "micro_batch", "seq", "grad_accum"), COUNT)
    other_names(parser, OTHER_NAMES, {**types, "sp": None})
    parser.add_argument("--reserve", default="20%", metavar="20%|8GiB", help=_("memory to keep free on each GPU"))
    parser.add_argument("--assume", action="store_true", help=_("go on over config keys that are not understood"))
    parser.add_argument("--no-calibration", action="store_true", help=_("do not use what ullage calibrate measured"))
    parser.add_argument("--no-advice", action="store_true", help=_("do not look for the cheapest change"))
    parser.add_argument("--metrics", action="store_true", help=_("also print ratios"))
    parser.add_argument("--json", action="store_true", help=_("print JSON (see ullage schema fit)"))


def _add_layout(group: Any) -> None:
    for flag, text in (
        ("--dp", _("data parallel size")),
        ("--tp", _("tensor parallel size")),
        ("--pp", _("pipeline parallel size")),
        ("--cp", _("context parallel size")),
        ("--ep", _("expert parallel size")),
        ("--etp", _("expert tensor parallel size")),
        ("--vpp", _("model chunks per pipeline rank")),
    ):
        group.add_argument(flag, type=COUNT, metavar="N", help=text)
    group.add_argument("--sp", action="store_true", help=_("sequence parallel"))
    schedules = ("gpipe", "1f1b", "interleaved", "zero_bubble", "dualpipe", "dualpipev")
    group.add_argument("--schedule", choices=schedules, help=_("of the pipeline"))
    group.add_argument("--zero", type=int, choices=(0, 1, 2, 3), help=_("ZeRO stage; 1: Megatron's optimizer too"))
    shards = ("full_shard", "shard_grad_op", "hybrid")
    group.add_argument("--fsdp", choices=shards, help=_("what FSDP shards"))


def _add_step(group: Any) -> None:
    group.add_argument("--micro-batch", type=COUNT, metavar="N", help=_("sequences per GPU and pass"))
    group.add_argument("--seq", type=COUNT, metavar="TOKENS", help=_("length of a sequence"))
    group.add_argument("--packing", action="store_true", help=_("sequences without padding: no attention mask"))
    group.add_argument("--grad-accum", type=COUNT, metavar="N", help=_("passes per optimizer step"))
    group.add_argument(
        "--precision", metavar="RECIPE", help=_("bf16-mixed, bf16-master, amp, bf16, fp32, fp8, mxfp8, nvfp4 ...")
    )
    group.add_argument("--optimizer", metavar="NAME", help=_("adamw, sgd, adamw_8bit, muon, galore_adamw,rank=128 ..."))
    impls = ("fused", "foreach", "for_loop")
    group.add_argument("--optimizer-impl", choices=impls, help=_("how PyTorch runs the optimizer"))
    group.add_argument("--recompute", metavar="KIND", help=_("none, full, selective, every=4, MODULES"))
    kernels = ("flash", "sdpa", "eager", "unfused")
    group.add_argument("--attention", choices=kernels, help=_("which kernel runs"))
    group.add_argument(
        "--loss", choices=("plain", "fused", "chunked", "liger", "tiled"), help=_("how the loss is computed")
    )
    group.add_argument(
        "--method", metavar="NAME", help=_("full, lora, dora, or another of PEFT: vera, ia3, loha, boft ...")
    )
    group.add_argument(
        "--lora", metavar="r=16", help=_("adapters: r=16,targets=q_proj+v_proj, or PEFT's adapter_config.json")
    )
    group.add_argument("--rlhf", metavar="KIND", help=_("dpo, kto, rm ... or grpo,completion=512,vllm=0.3,sleep"))
    group.add_argument(
        "--evaluate", metavar="N", help=_("evaluation between steps: sequences per GPU; 8,seq=2048,kept=10")
    )
    group.add_argument(
        "--routing", metavar="WIDTH", help=_("how uneven experts are chosen: bias, auxiliary-loss, or a number")
    )
    group.add_argument("--base-quantization", metavar="NAME", help=_("of the frozen base: nf4, int8, gptq"))
    group.add_argument("--offload", metavar="WHAT=cpu", action="append", help=_("optimizer=cpu, params=cpu ..."))
    group.add_argument("--compile", action="store_true", help=_("torch.compile"))


def run(arguments: argparse.Namespace) -> int:
    """Run the command; the exit code is the verdict."""
    return answer(job_of(arguments), arguments)


def answer(job: TrainingJob, arguments: argparse.Namespace) -> int:
    """Fit the job and print it."""
    from ullage.training_fit import fit_training

    result = fit_training(
        job, reserve=arguments.reserve, advise=not arguments.no_advice, calibrated=not arguments.no_calibration
    )
    result = replace(result, next_command=_next(result, arguments))
    if arguments.json:
        from ullage.cli import print_json
        from ullage.report.train_json import training_json

        print_json(training_json(result))
    else:
        from ullage.report.train_text import print_training

        print_training(result, metrics=arguments.metrics)
    return result.exit_code


def _next(result: TrainingFit, arguments: argparse.Namespace) -> str:
    """Return what to type next: the same fit with the first advice that mends it, or with the largest micro-batch."""
    from ullage.advise import merge_flags
    from ullage.cli.fit import typed_again

    largest = max(result.ledger.terms(), key=lambda term: term.bytes)
    what = getattr(arguments, "what", None)
    again = typed_again(arguments, "fit" if what else "fit train")
    explain = f"ullage explain {largest.name} {again.removeprefix('ullage ')}"
    if arguments.line or what:
        return explain  # the file says what would be changed
    flags = ""
    if result.verdict != "fits":
        flags = result.advice[0].flags if result.advice and result.advice[0].verdict != "does_not_fit" else ""
    elif result.largest and (result.largest.micro_batch_size or 0) > result.job.micro_batch_size:
        flags = f"--micro-batch {result.largest.micro_batch_size}"
    return merge_flags(again, flags) if flags else explain


def job_of(arguments: argparse.Namespace) -> TrainingJob:
    """Build the job that the command line or a launch file states."""
    if arguments.line:
        return _from_launch_file(arguments)
    return _from_flags(arguments)


def _from_launch_file(arguments: argparse.Namespace) -> TrainingJob:
    from pathlib import Path

    from ullage.read.training_file import megatron_job, split_line
    from ullage.read.training_parts import OVERLAYS, STATED
    from ullage.read.tuner_recipes import TUNERS

    engine, version, rest = split_line(arguments.line)
    if arguments.on is None:
        raise InputError(_("no machine is named"), where="--on", remedy=_("write for example --on 8xH100"))
    if engine == "megatron":
        _refuse(arguments, arguments.line, except_for=("model",))
        return megatron_job(rest, version, machine=arguments.on, model=arguments.model, assume=arguments.assume)
    if engine in TUNERS:
        return _from_tuner(arguments, engine, version, rest)
    if engine not in OVERLAYS:
        return _from_recipe(arguments, engine, version, rest)
    _refuse(arguments, arguments.line, only=STATED[engine])
    engine_of_file = "fsdp2" if engine == "accelerate" else engine
    arguments.engine = f"{engine_of_file}@{version}" if version else engine_of_file
    return OVERLAYS[engine](_from_flags(arguments), Path(rest))


def _from_recipe(arguments: argparse.Namespace, kind: str, version: str, rest: str) -> TrainingJob:
    """Build the job of a fine-tuning recipe; MODEL wins over the one that it names."""
    from ullage.read.recipes import STATED, model_of, read_fields, with_recipe

    _refuse(arguments, arguments.line, only=(*STATED, "packing"))
    fields = read_fields(rest)
    arguments.model = arguments.model or model_of(fields)
    if arguments.model is None:
        raise InputError(_("the file names no model"), where=fields.where, remedy=_("name one before --from"))
    arguments.engine = f"hf_trainer@{version}" if version else "hf_trainer"
    return with_recipe(kind, fields, _from_flags(arguments))


def _from_tuner(arguments: argparse.Namespace, engine: str, version: str, rest: str) -> TrainingJob:
    """Build the job of a recipe of torchtune or litgpt; MODEL wins over the one that it names."""
    from ullage.read.machine import parse_machine
    from ullage.read.tuner_recipes import STATED, read_tuner, with_tuner

    _refuse(arguments, arguments.line, only=(*STATED, "packing"))
    words = read_tuner(engine, rest, parse_machine(arguments.on).num_gpus)
    arguments.model = arguments.model or words.model
    if arguments.model is None:
        raise InputError(_("the file names no model"), where=rest[:80], remedy=_("name one before --from"))
    arguments.engine = f"{engine}@{version}" if version else engine
    arguments.precision = "bf16"  # the only one that a recipe of these may ask for
    return with_tuner(_from_flags(arguments), words)


def _refuse(
    arguments: argparse.Namespace, line: str, *, except_for: tuple[str, ...] = (), only: tuple[str, ...] = ()
) -> None:
    """Refuse options that the launch file states: one of the two would be left out without a word."""
    own = {*except_for, "line", "on", "reserve", "assume", "no_calibration", "no_advice", "metrics", "json", "words"}
    given = [
        name
        for name, value in vars(arguments).items()
        if value not in (None, False) and (name in only if only else name not in own)
    ]
    if given:
        raise InputError(
            _("{file} says that already: {options}").format(
                file=line[:80], options=", ".join("--" + name.replace("_", "-") for name in given)
            ),
            remedy=_("change the launch file, or leave out --from"),
        )


def _from_flags(arguments: argparse.Namespace) -> TrainingJob:
    """Build the job that the flags state."""
    from ullage.engines.routing import parse_routing
    from ullage.read.adapter_words import parse_adapters
    from ullage.read.evaluation_words import parse_evaluation
    from ullage.read.machine import parse_machine
    from ullage.read.model_source import load_model
    from ullage.read.rlhf_words import parse_rlhf
    from ullage.read.training_words import filled_pipeline, parse_precision, parse_recompute
    from ullage.spec.training import TrainingJob

    if arguments.model is None:
        raise InputError(_("no model is named"), remedy=_("write ullage fit train MODEL --on 8xH100"))
    if arguments.on is None:
        raise InputError(_("no machine is named"), where="--on", remedy=_("write ullage fit train MODEL --on 8xH100"))
    machine = parse_machine(arguments.on)
    engine = arguments.engine or ("hf_trainer" if machine.num_gpus == 1 else "fsdp2")
    engine, _at, version = engine.partition("@")
    precision, said = parse_precision(arguments.precision, engine)
    optimizer, _ranked, rank = (arguments.optimizer or "").partition(",rank=")
    lora, method = parse_adapters(arguments.method, arguments.lora)
    parallel = _parallel(arguments, machine, engine)
    accumulated = arguments.grad_accum or filled_pipeline(parallel)
    if accumulated > 1 and not arguments.grad_accum:
        said += (_("passes per step: {count}, so that the pipeline is full").format(count=accumulated),)
    quantization = arguments.base_quantization or ("nf4" if method == "qlora" else None)
    method = "qlora" if quantization and method in ("lora", "dora") else method
    return TrainingJob(
        model=load_model(arguments.model, assume=arguments.assume, network=True),
        machine=machine,
        engine=engine,
        engine_version=version,
        parallel=parallel,
        precision=precision,
        optimizer=_optimizer(optimizer or None),
        optimizer_impl=arguments.optimizer_impl,
        micro_batch_size=arguments.micro_batch or 1,
        seq_len=arguments.seq or DEFAULT_SEQ_LEN,
        packing=_packing(arguments, engine),
        grad_accum=accumulated,
        recompute=parse_recompute(arguments.recompute),
        attention=arguments.attention,
        compile=arguments.compile,
        loss=arguments.loss,
        method=method,
        lora=lora,
        rlhf=parse_rlhf(arguments.rlhf) if arguments.rlhf else None,
        routing_sigma=parse_routing(arguments.routing) if arguments.routing else None,
        evaluation=parse_evaluation(arguments.evaluate) if arguments.evaluate else None,
        base_quantization=quantization,
        flags=(("optim_rank", rank),) if rank else (),
        offload=_offload(arguments.offload or ()),
        assumed=(*said, *(() if arguments.line else _not_given(arguments, engine, parallel))),
    )


def _not_given(arguments: argparse.Namespace, engine: str, parallel: TrainingParallel) -> Iterator[str]:
    """Yield what was taken where nothing was said."""
    if not arguments.engine:
        yield _("framework: {engine}").format(engine=engine)
    if not any((arguments.dp, arguments.tp, arguments.pp, arguments.cp)) and parallel.data_parallel_size > 1:
        sharded = _(", sharded as {kind}").format(kind=parallel.fsdp) if parallel.fsdp else ""
        count = parallel.data_parallel_size
        yield _("layout not given: data parallel over {count} GPUs").format(count=count) + sharded
    words = {
        _("micro-batch 1"): arguments.micro_batch,
        _("sequences of {count:,} tokens").format(count=DEFAULT_SEQ_LEN): arguments.seq,
        _("optimizer adamw"): arguments.optimizer,
        _("no recompute"): arguments.recompute or (engine == "unsloth") or None,  # Unsloth has a default of its own
    }
    if engine in MASKED and not arguments.packing and arguments.attention in (None, "sdpa"):
        words[_("padding with an attention mask")] = None
    taken = ", ".join(word for word, given in words.items() if given is None)
    if taken:
        yield _("not given: {taken}").format(taken=taken)


def _packing(arguments: argparse.Namespace, engine: str) -> bool:
    if arguments.packing and engine not in MASKED:
        raise InputError(
            _("sequences of {engine} are counted without padding").format(engine=engine),
            where="--packing",
            remedy=_("leave it out"),
        )
    return bool(arguments.packing)


def _optimizer(name: str | None) -> str:
    """Return the optimizer; a name that no rule knows is refused before a framework is blamed for it."""
    from ullage.account.optimizer import RULES, rule_name
    from ullage.engines.follows import FOLLOWS

    if name is None:
        return "adamw"
    known = {*RULES, *(each for follows in FOLLOWS.values() for each in follows.optimizers or ())}
    if name not in known and rule_name(name) not in known:
        from ullage.cli.words import nearest_word

        near = nearest_word(name, sorted(known))
        remedy = _("did you mean {name}?").format(name=near) if near else ""
        raise InputError(
            _("unknown optimizer {name!r}").format(name=name[:40]),
            where="--optimizer",
            remedy=remedy or _("known are {known}").format(known=", ".join(RULES)),
        )
    return name if name in known else rule_name(name)


def _parallel(arguments: argparse.Namespace, machine: Machine, engine: str) -> TrainingParallel:
    """Return the layout; the data-parallel size is what the others leave, unless it is given."""
    from ullage.errors import LayoutError
    from ullage.spec.training import TrainingParallel

    tensor, pipeline, context = arguments.tp or 1, arguments.pp or 1, arguments.cp or 1
    others, world = tensor * pipeline * context, machine.num_gpus
    data = arguments.dp or max(1, world // others)
    if data * others != world:
        raise LayoutError(
            _("the layout needs {need} GPUs and the machine has {world}").format(need=data * others, world=world),
            where="--dp, --tp, --pp, --cp",
            remedy=_("their product must be the number of GPUs"),
        )
    sharded: FsdpSharding | None = arguments.fsdp or (
        "full_shard" if engine in ("fsdp1", "fsdp2", "torchtitan") else None
    )
    return TrainingParallel(
        data_parallel_size=data,
        tensor_parallel_size=tensor,
        sequence_parallel=arguments.sp,
        context_parallel_size=context,
        pipeline_parallel_size=pipeline,
        virtual_pipeline_parallel_size=arguments.vpp or 1,
        schedule=arguments.schedule or ("1f1b" if pipeline > 1 else None),
        expert_parallel_size=arguments.ep or 1,
        expert_tensor_parallel_size=arguments.etp,
        zero_stage=arguments.zero or 0,
        fsdp=sharded,
        shard_group_size=machine.gpus_per_node if sharded == "hybrid" else None,
    )


def _offload(words: Any) -> tuple[tuple[str, str], ...]:
    pairs = [tuple(word.split("=", 1)) for word in words]
    for pair in pairs:
        if len(pair) != 2 or pair[0] not in ("optimizer", "params", "activations") or pair[1] not in ("cpu", "nvme"):
            raise InputError(
                _("{word!r} is no offload").format(word="=".join(pair)[:40]),
                where="--offload",
                remedy=_("write optimizer=cpu, params=cpu or activations=cpu"),
            )
    return tuple((what, where) for what, where in pairs)
