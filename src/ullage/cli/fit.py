"""``ullage fit serve MODEL --on MACHINE``, ``ullage fit --from ENGINE:'LINE'``, ``ullage fit JOBFILE``."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ullage.cli.words import other_names
from ullage.errors import InputError
from ullage.i18n import _
from ullage.units import parse_count, parse_size

if TYPE_CHECKING:
    from ullage.spec.serving import ServingJob
    from ullage.spec.training import TrainingJob


def _typed(parse: Callable[[str], Any], name: str) -> Callable[[str], Any]:
    """Return a type for argparse whose errors keep their own words."""

    def parse_or_refuse(text: str) -> Any:
        try:
            return parse(text)
        except InputError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        except ValueError:
            raise argparse.ArgumentTypeError(_("{text!r} is not {name}").format(text=text[:60], name=name)) from None

    return parse_or_refuse


def _positive(text: str) -> int:
    value = parse_count(text)
    if value < 1:
        raise InputError(_("{text!r} is not a positive number").format(text=text[:60]))
    return value


def _size(text: str) -> int:
    if text.strip("0. ").isdigit():
        raise InputError(
            _("{text!r} has no unit").format(text=text[:60]), remedy=_("write for example {text}GiB").format(text=text)
        )
    return parse_size(text)


def _share(text: str) -> float:
    value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    if not 0 < value <= 1:
        raise InputError(_("{text!r} is not a share above 0 and up to 1").format(text=text[:60]))
    return value


COUNT = _typed(_positive, "a count")
ANY_COUNT = _typed(parse_count, "a count")
SIZE = _typed(_size, "a size")
GIB = _typed(lambda text: parse_size(text, default_unit="GiB"), "a size")
SHARE = _typed(_share, "a share")
#: What the engines call the same; not listed, so that the help stays short.
OTHER_NAMES = {
    "-tp": "tp", "--tensor-parallel-size": "tp", "--tp-size": "tp",
    "-pp": "pp", "--pipeline-parallel-size": "pp", "--pp-size": "pp",
    "-dp": "dp", "--data-parallel-size": "dp", "--dp-size": "dp",
    "-dcp": "dcp", "--decode-context-parallel-size": "dcp",
    "--max-model-len": "context", "--context-length": "context", "--ctx-size": "context",
    "--max-num-batched-tokens": "max_batched_tokens", "--chunked-prefill-size": "max_batched_tokens",
    "--max-running-requests": "max_num_seqs", "--mem-fraction-static": "memory_fraction",
    "--disable-cuda-graph": "enforce_eager", "--cpu-offload-gb": "cpu_offload",
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.usage = (
        "ullage fit serve MODEL --on MACHINE [options]\n"
        "       ullage fit serve --from ENGINE:'LAUNCH LINE' [--on MACHINE] [options]\n"
        "       ullage fit train MODEL --on MACHINE [options]   (see ullage fit train --help)\n"
        "       ullage fit JOBFILE [options]"
    )
    parser.add_argument("what", nargs="?", metavar="serve|JOBFILE", help=_("serve, or a job file"))
    parser.add_argument("model", nargs="?", metavar="MODEL", help=_("name, folder, config.json, .gguf file or hub id"))
    parser.add_argument("--on", metavar="MACHINE", help=_("such as 8xH200, 2x8xH20 (2 nodes of 8), A100-40GB, 24GiB"))
    parser.add_argument("--from", dest="line", metavar="ENGINE:LINE", help=_("a launch line in the engine's own words"))
    parser.add_argument("--engine", metavar="NAME[@VERSION]", help=_("vllm, sglang or llamacpp; the newest mirrored"))
    _add_layout(parser.add_argument_group(_("layout")))
    _add_load(parser.add_argument_group(_("load and settings")))
    types = dict.fromkeys(("tp", "pp", "dp", "dcp", "context", "max_batched_tokens", "max_num_seqs"), COUNT)
    other_names(parser, OTHER_NAMES, {**types, "memory_fraction": SHARE, "enforce_eager": None, "cpu_offload": GIB})
    parser.add_argument("--reserve", default="20%", metavar="20%|8GiB", help=_("memory to keep free on each GPU"))
    parser.add_argument("--assume", action="store_true", help=_("go on over config keys that are not understood"))
    parser.add_argument("--no-calibration", action="store_true", help=_("do not use what ullage calibrate measured"))
    parser.add_argument("--no-advice", action="store_true", help=_("do not look for the cheapest change"))
    parser.add_argument("--metrics", action="store_true", help=_("also print ratios"))
    parser.add_argument("--json", action="store_true", help=_("print JSON (see ullage schema fit)"))


def _add_layout(group: Any) -> None:
    group.add_argument("--tp", type=COUNT, metavar="N", help=_("tensor parallel size"))
    group.add_argument("--pp", type=COUNT, metavar="N", help=_("pipeline parallel size"))
    group.add_argument("--dp", type=COUNT, metavar="N", help=_("data parallel size"))
    group.add_argument("--ep", nargs="?", const=0, type=ANY_COUNT, metavar="N", help=_("experts spread over the ranks"))
    group.add_argument(
        "--dp-attention", nargs="?", const=0, type=ANY_COUNT, metavar="N", help=_("attention data-parallel over N")
    )
    for flag in ("--expert-parallel", "--enable-expert-parallel"):
        group.add_argument(flag, dest="ep", action="store_const", const=0, help=argparse.SUPPRESS)
    group.add_argument(
        "--enable-dp-attention", dest="dp_attention", action="store_const", const=0, help=argparse.SUPPRESS
    )
    group.add_argument("--dcp", type=COUNT, metavar="N", help=_("decode context parallel size"))
    group.add_argument("--redundant-experts", type=ANY_COUNT, metavar="N", help=_("copies of experts over all ranks"))


def _add_load(group: Any) -> None:
    group.add_argument("--context", type=COUNT, metavar="TOKENS", help=_("length of a request, such as 32768 or 32k"))
    group.add_argument("--concurrency", type=COUNT, metavar="N", help=_("requests of that length at a time"))
    group.add_argument("--dtype", metavar="FORMAT", help=_("of weights that are not quantised"))
    group.add_argument("--quantization", metavar="NAME", help=_("of the weights, when it is not the checkpoint's own"))
    group.add_argument("--kv-dtype", "--kv-cache-dtype", dest="kv_dtype", metavar="FORMAT", help=_("of the KV cache"))
    group.add_argument("--max-batched-tokens", type=COUNT, metavar="N", help=_("tokens of one step"))
    group.add_argument("--max-num-seqs", type=COUNT, metavar="N", help=_("requests that the engine runs at a time"))
    group.add_argument(
        "--gpu-memory-utilization", "--memory-fraction", dest="memory_fraction", type=SHARE, metavar="SHARE",
        help=_("share of the device that the engine may take"),
    )  # fmt: skip
    group.add_argument("--enforce-eager", action="store_true", default=None, help=_("no CUDA graphs"))
    group.add_argument("--block-size", type=COUNT, metavar="TOKENS", help=_("of the KV cache"))
    group.add_argument("--mtp", nargs="?", const=1, type=COUNT, metavar="N", help=_("speculate N tokens with MTP"))
    group.add_argument("--cpu-offload", type=SIZE, metavar="SIZE", help=_("weights kept in host memory, per GPU"))


def run(arguments: argparse.Namespace) -> int:
    """Run the command; the exit code is the verdict."""
    from ullage.advise import next_command
    from ullage.fitting import fit_serving
    from ullage.spec.training import TrainingJob

    job = job_of(arguments)
    if isinstance(job, TrainingJob):
        from ullage.cli.fit_train import answer

        return answer(job, arguments)
    result = fit_serving(
        job,
        context=arguments.context,
        concurrency=arguments.concurrency,
        reserve=arguments.reserve,
        advise=not arguments.no_advice,
        calibrated=not arguments.no_calibration,
    )
    if result.advice:
        again = "" if arguments.line and "--tp" in result.advice[0].flags else typed_again(arguments)
        result = replace(result, next_command=next_command(result, again))
    if arguments.json:
        from ullage.cli import print_json
        from ullage.report.json import fit_json

        print_json(fit_json(result))
    else:
        from ullage.report.text import print_fit

        print_fit(result, metrics=arguments.metrics)
    return result.exit_code


def typed_again(arguments: argparse.Namespace, command: str = "fit") -> str:
    """Return the command as it was typed, to be typed again with a change."""
    words = [word for word in getattr(arguments, "words", ()) if word not in ("--json", "--metrics")]
    return f"ullage {command} {shlex.join(words)}" if words else ""


def job_of(arguments: argparse.Namespace) -> ServingJob | TrainingJob:
    """Build the job that the command line states; a job file may hold a training job."""
    what, model = arguments.what, arguments.model
    if arguments.line and what in (None, "serve"):
        return _changed(_from_line(arguments), arguments)
    if what == "serve":
        if model is None:
            raise InputError(_("no model is named"), remedy=_("write ullage fit serve MODEL --on 8xH200"))
        return _from_flags(arguments)
    if what is None:
        raise InputError(_("nothing to fit"), remedy=_("write ullage fit serve MODEL --on 8xH200, or a job file"))
    return _from_file(what, arguments)


def _from_file(what: str, arguments: argparse.Namespace) -> ServingJob | TrainingJob:
    from ullage.cli.fit_checks import refuse_layout
    from ullage.read.job_file import read_job_file
    from ullage.read.jsonfile import is_file
    from ullage.spec.serving import ServingJob

    if arguments.line or not is_file(Path(what)):
        raise InputError(
            _("{word!r} is neither serve nor a job file").format(word=what[:80]),
            remedy=_("write ullage fit serve MODEL --on 8xH200"),
        )
    if arguments.model is not None:
        raise InputError(_("{word!r} is one word too many").format(word=arguments.model[:60]), where=what[:80])
    job = read_job_file(Path(what), machine=arguments.on, assume=arguments.assume)
    if not isinstance(job, ServingJob):
        return _only_training(job, arguments)
    refuse_layout(arguments, where=what[:80])
    return _changed(job, arguments)


def _only_training(job: TrainingJob, arguments: argparse.Namespace) -> TrainingJob:
    """Refuse options of serving beside a training job: they would be left out without a word."""
    allowed = {"what", "on", "reserve", "assume", "no_calibration", "no_advice", "metrics", "json", "words"}
    given = [name for name, value in vars(arguments).items() if name not in allowed and value not in (None, False)]
    if given:
        raise InputError(
            _("a training job does not take {options}").format(
                options=", ".join("--" + name.replace("_", "-") for name in given)
            ),
            remedy=_("change the job file"),
        )
    return job


def _from_flags(arguments: argparse.Namespace) -> ServingJob:
    from ullage.read.machine import parse_machine
    from ullage.read.model_source import load_model
    from ullage.request import parse_engine, serving_job, stated_parallel

    if arguments.on is None:
        raise InputError(_("no machine is named"), where="--on", remedy=_("write for example --on 8xH200"))
    machine = parse_machine(arguments.on)
    model = load_model(arguments.model, assume=arguments.assume, network=True)
    engine = arguments.engine or ("llamacpp" if arguments.model.lower().endswith(".gguf") else "vllm")
    stated = {
        "tensor": arguments.tp,
        "pipeline": arguments.pp,
        "data": arguments.dp,
        "dp_attention": arguments.dp_attention,
        "decode_context": arguments.dcp,
    }
    if all(value is None for value in stated.values()):
        return _changed(serving_job(model, machine, engine=engine), arguments)
    name, _version = parse_engine(engine)
    parallel, said = stated_parallel(model, machine, name, **stated)
    job = serving_job(model, machine, engine=engine, parallel=parallel)
    return _changed(replace(job, assumed=(*job.assumed, *said)), arguments)


def _changed(job: ServingJob, arguments: argparse.Namespace) -> ServingJob:
    """Lay the flags that were given over the job."""
    from ullage.cli.fit_checks import check_options, checked_layout

    check_options(job, arguments)
    given = {
        "max_model_len": arguments.context,
        "max_num_seqs": arguments.max_num_seqs,
        "max_num_batched_tokens": arguments.max_batched_tokens,
        "memory_fraction": arguments.memory_fraction,
        "enforce_eager": arguments.enforce_eager,
        "block_size": arguments.block_size,
        "quantization": arguments.quantization,
        "weights_dtype": arguments.dtype,
        "kv_cache_dtype": arguments.kv_dtype,
        "redundant_experts": arguments.redundant_experts,
        "cpu_offload_bytes": arguments.cpu_offload,
        "speculative": "mtp" if arguments.mtp else None,
        "num_speculative_tokens": arguments.mtp,
    }
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if arguments.ep is not None:
        size = arguments.ep or None
        changes["parallel"] = replace(job.parallel, expert_parallel=True, expert_parallel_size=size)
    if job.native and changes:
        changes["native"] = _overlaid(job, changes)
    changed = checked_layout(replace(job, **changes))
    if arguments.quantization is None:
        return changed
    from ullage.request import requantised

    return requantised(changed)


def _overlaid(job: ServingJob, changes: dict[str, Any]) -> str:
    """Return the launch line with the options laid over it: of a flag that is said twice, engines take the last."""
    from ullage.fitting import ELASTIC_POOLS
    from ullage.launch import setting_words
    from ullage.spec.serving import ServingJob

    if job.engine not in ELASTIC_POOLS:
        return ""  # its context is that of all requests together: written anew
    said = {name: value for name, value in changes.items() if name not in ("parallel", "max_model_len")}
    bare = ServingJob(model=job.model, machine=job.machine, engine=job.engine, engine_version=job.engine_version)
    words = setting_words(replace(bare, **said))
    if "max_model_len" in changes:
        flag = "--max-model-len" if job.engine == "vllm" else "--context-length"
        words.append(f"{flag} {changes['max_model_len']}")
    if "quantization" in changes:
        words.append(f"--quantization {changes['quantization']}")
    if "parallel" in changes:
        parallel = changes["parallel"]
        size = parallel.expert_parallel_size or parallel.tensor_parallel_size
        words.append("--enable-expert-parallel" if job.engine == "vllm" else f"--ep-size {size}")
    return " ".join((job.native, *words))


def _from_line(arguments: argparse.Namespace) -> ServingJob:
    from ullage.cli.fit_checks import refuse_layout
    from ullage.read.launch_line import read_launch_line

    refuse_layout(arguments, where="--from")
    return read_launch_line(arguments.line, machine=arguments.on, model=arguments.model, assume=arguments.assume)
