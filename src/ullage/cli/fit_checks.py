"""Options of ``ullage fit`` that cannot go together, or that nothing would follow: refused in one sentence each."""

from __future__ import annotations

import argparse
from collections.abc import Iterable

from ullage.errors import InputError, LayoutError
from ullage.fitting import ELASTIC_POOLS
from ullage.i18n import _
from ullage.request import check_layout
from ullage.spec.model import MoEFFN
from ullage.spec.serving import ServingJob
from ullage.units import DTYPE_BYTES, canonical_dtype

#: Options that llama.cpp has nothing for: it spreads layers over all devices, and a GGUF file says the rest.
NOT_FOR_GGUF = (
    "tp", "pp", "dcp", "ep", "dp_attention", "memory_fraction", "enforce_eager", "block_size", "dtype",
    "redundant_experts", "cpu_offload", "mtp",
)  # fmt: skip
#: What a launch line or a job file says itself.
LAYOUT = ("engine", "tp", "pp", "dp", "dp_attention", "dcp")
#: Formats that an engine's --dtype takes; smaller ones are quantisations.
WHOLE_DTYPES = ("float16", "bfloat16", "float32")


def flags_given(arguments: argparse.Namespace, names: Iterable[str]) -> str:
    """Return those of ``names`` that were typed, as flags."""
    given = [name for name in names if not any(getattr(arguments, name) is none for none in (None, False))]
    return ", ".join("--" + name.replace("_", "-") for name in given)


def refuse_layout(arguments: argparse.Namespace, *, where: str) -> None:
    """Refuse a layout beside a launch line or a job file, which has its own."""
    if given := flags_given(arguments, LAYOUT):
        raise InputError(
            _("the engine and its layout are stated there"),
            where=where,
            remedy=_("leave out {options}").format(options=given),
        )


def check_options(job: ServingJob, arguments: argparse.Namespace) -> None:
    """Refuse options that the engine would pass over."""
    if job.engine not in ELASTIC_POOLS:
        if given := flags_given(arguments, NOT_FOR_GGUF):
            raise InputError(
                _("{engine} has nothing like {options}").format(engine=job.engine, options=given),
                remedy=_("its own words can be given with --from llamacpp:'llama-server …'"),
            )
        return
    if arguments.redundant_experts and arguments.ep is None and not job.parallel.expert_parallel:
        raise InputError(
            _("redundant experts exist only where experts are spread"),
            where="--redundant-experts",
            remedy=_("add --ep"),
        )
    if arguments.dtype and canonical_dtype(arguments.dtype) not in WHOLE_DTYPES:
        raise InputError(
            _("{engine} does not take {dtype}").format(engine=job.engine, dtype=arguments.dtype[:40]),
            where="--dtype",
            remedy=_("write --quantization for smaller weights; known here are {known}").format(
                known=", ".join(name for name in DTYPE_BYTES if name in WHOLE_DTYPES)
            ),
        )
    _check_model(job, arguments)


def _check_model(job: ServingJob, arguments: argparse.Namespace) -> None:
    """Refuse what the model has nothing for; the engines refuse it at their start."""
    model = job.model
    if arguments.ep is not None and not any(isinstance(ffn, MoEFFN) for layer in model.layers for ffn in layer.ffns):
        raise InputError(_("{model} has no experts to spread").format(model=model.name), where="--ep")
    if arguments.mtp is not None and not model.mtp:
        raise InputError(_("{model} has no layers for it").format(model=model.name), where="--mtp")


def checked_layout(job: ServingJob) -> ServingJob:
    """Refuse a layout that needs more GPUs than there are, or spreads experts over others than its ranks."""
    parallel = check_layout(job).parallel
    spread = 1 if job.engine == "sglang" and parallel.dp_attention else parallel.data_parallel_size
    ranks, experts = parallel.tensor_parallel_size * spread, parallel.expert_parallel_size
    if experts and (experts != ranks if job.engine == "vllm" else ranks % experts):
        raise LayoutError(
            _("{engine} cannot spread experts over {experts} of {ranks} ranks").format(
                engine=job.engine, experts=experts, ranks=ranks
            ),
            where="--ep",
            remedy=_("write --ep alone: it takes all of them"),
        )
    return job
