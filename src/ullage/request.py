"""Settings as people give them → :class:`ullage.spec.serving.ServingJob`, with a layout when none was given."""

from __future__ import annotations

import math
from dataclasses import replace
from importlib import import_module
from typing import Any

from ullage.engines.serving import SERVING_ENGINES
from ullage.errors import InputError
from ullage.fitting import ELASTIC_POOLS
from ullage.i18n import _
from ullage.spec.machine import Machine
from ullage.spec.model import Model
from ullage.spec.serving import ServingJob, ServingParallel


def parse_engine(text: str) -> tuple[str, str]:
    """Parse ``vllm`` or ``vllm@0.33`` into engine and version; without one, the newest that is mirrored.

    Raises:
        InputError: not an engine that is known.
    """
    name, _at, version = text.strip().lower().partition("@")
    name = {"llama.cpp": "llamacpp", "llama-cpp": "llamacpp", "ik_llama": "ik_llama.cpp"}.get(name, name)
    if name not in SERVING_ENGINES:
        raise InputError(
            _("unknown engine {engine!r}").format(engine=text[:40]),
            where="--engine",
            remedy=_("known are {known}").format(known=", ".join(SERVING_ENGINES)),
        )
    return name, version or newest_version(name)


def requantised(job: ServingJob) -> ServingJob:
    """Return the job with the model that its ``quantization`` asks for; llama.cpp's types are those of GGUF files.

    Raises:
        InputError: a quantisation that is not known.
    """
    name = job.quantization
    if not name:
        return job
    gguf = name.lower().startswith("gguf")
    if job.engine not in ELASTIC_POOLS:
        return replace(job, quantization=_gguf_type(name))
    if gguf:
        raise gguf_elsewhere(job.engine, name)
    from ullage.read.quantization_names import release

    model, left = release(job.model, name)
    return replace(job, model=model, quantization=left)


def gguf_elsewhere(engine: str, name: str) -> InputError:
    """Return the error for a type of GGUF files under an engine whose copies of them are not counted."""
    return InputError(
        _("what {engine} holds of a GGUF file of type {name} is not counted").format(engine=engine, name=name[:40]),
        where="--quantization",
        remedy=_("ask llama.cpp with --engine llamacpp, or name the .gguf file as the model"),
    )


def _gguf_type(name: str) -> str:
    from ullage.engines.llamacpp.recipe import file_type

    if file_type(name) is None:
        raise InputError(
            _("{name!r} names no type of GGUF files").format(name=name[:40]),
            where="--quantization",
            remedy=_("such types are Q4_K_M, Q8_0, IQ2_XXS, MXFP4, BF16"),
        )
    return name if name.lower().startswith("gguf") else f"gguf:{name}"


def newest_version(engine: str) -> str:
    """Return the newest version of an engine that is mirrored."""
    versions: tuple[str, ...] = tuple(import_module(SERVING_ENGINES[engine]).VERSIONS)
    own = [version for version in versions if version.split()[0] == engine]  # llama.cpp's forks are listed beside it
    return (own or versions)[-1]


def attention_heads(model: Model) -> int:
    """Return the largest number that divides the heads of every kind of mixer: tensor parallelism must divide it."""
    found = 0
    for mixer in {mixer for layer in model.layers for mixer in layer.mixers}:
        heads = getattr(mixer, "num_heads", None) or getattr(mixer, "num_v_heads", None)
        if heads:
            found = math.gcd(found, heads)
    return found or 1


def default_parallel(
    model: Model, machine: Machine, *, pipeline: int | None = None, data: int = 1
) -> tuple[ServingParallel, tuple[str, ...]]:
    """Return the layout taken when no tensor-parallel size is given.

    Tensor parallel within a node over the GPUs that ``pipeline`` stages and ``data`` replicas leave; pipeline parallel
    over nodes unless ``pipeline`` says otherwise.
    """
    heads = attention_heads(model)
    stages = pipeline or (machine.num_nodes if data == 1 else 1)
    most = min(machine.gpus_per_node, max(1, machine.num_gpus // (stages * data)))
    tensor = next(size for size in range(most, 0, -1) if heads % size == 0)
    parallel = ServingParallel(tensor_parallel_size=tensor, pipeline_parallel_size=stages, data_parallel_size=data)
    if machine.num_gpus == 1:
        return parallel, ()
    parts = [_("tensor parallel over {count} GPUs").format(count=tensor)]
    if stages > 1 and pipeline is None:
        parts.append(_("pipeline parallel over {count} nodes").format(count=stages))
    sentence = _("layout not given: {parts}").format(parts=", ".join(parts))
    idle = machine.num_gpus - tensor * stages * data
    if idle > 0:
        sentence += _("; {count} GPUs stay idle, because no more divide {heads} heads").format(count=idle, heads=heads)
    return parallel, (sentence,)


def stated_parallel(
    model: Model,
    machine: Machine,
    engine: str,
    *,
    tensor: int | None = None,
    pipeline: int | None = None,
    data: int | None = None,
    dp_attention: int | None = None,
    decode_context: int | None = None,
) -> tuple[ServingParallel, tuple[str, ...]]:
    """Complete a layout of which only a part was given; ``dp_attention`` 0 means as many as there are.

    SGLang's attention data parallelism divides its tensor-parallel group. vLLM has the same effect with data-parallel
    replicas of one GPU and experts spread over all of them.
    """
    if dp_attention is not None and engine == "sglang":
        whole, said = default_parallel(model, machine, pipeline=pipeline)
        size = tensor or whole.tensor_parallel_size
        parallel = replace(whole, tensor_parallel_size=size, data_parallel_size=data or dp_attention or size)
        said = said if tensor is None else ()
    elif dp_attention is not None:
        replicas = data or dp_attention or machine.num_gpus // ((tensor or 1) * (pipeline or 1))
        parallel, said = ServingParallel(tensor_parallel_size=tensor or 1, data_parallel_size=max(1, replicas)), ()
        parallel = replace(parallel, pipeline_parallel_size=pipeline or 1, expert_parallel=True)
    elif tensor is None:
        parallel, said = default_parallel(model, machine, pipeline=pipeline, data=data or 1)
    else:
        parallel, said = ServingParallel(tensor_parallel_size=tensor, data_parallel_size=data or 1), ()
        parallel = replace(parallel, pipeline_parallel_size=pipeline or 1)
    parallel = replace(
        parallel, dp_attention=dp_attention is not None, decode_context_parallel_size=decode_context or 1
    )
    return parallel, said


def serving_job(
    model: Model,
    machine: Machine,
    *,
    engine: str = "vllm",
    parallel: ServingParallel | None = None,
    **settings: Any,
) -> ServingJob:
    """Build the job; ``settings`` are fields of :class:`ServingJob` (None: not given).

    Raises:
        InputError: unknown engine, or a layout that needs more GPUs than there are.
    """
    name, version = parse_engine(engine)
    assumed: tuple[str, ...] = () if "@" in engine else (_("{engine} {version}").format(engine=name, version=version),)
    if parallel is None and name in ELASTIC_POOLS:
        parallel, said = default_parallel(model, machine)
        assumed += said
    job = ServingJob(
        model=model,
        machine=machine,
        engine=name,
        engine_version=version,
        parallel=parallel or ServingParallel(),
        assumed=assumed,
    )
    known = {key: value for key, value in settings.items() if value is not None}
    return check_layout(replace(job, **known))


def check_layout(job: ServingJob) -> ServingJob:
    """Refuse a layout whose world is larger than the machine.

    SGLang's attention data parallelism divides the tensor-parallel group; everywhere else the sizes multiply.
    """
    parallel = job.parallel
    spread = 1 if job.engine == "sglang" and parallel.dp_attention else parallel.data_parallel_size
    world = parallel.tensor_parallel_size * parallel.pipeline_parallel_size * spread
    if world > job.machine.num_gpus:
        from ullage.errors import LayoutError

        raise LayoutError(
            _("the layout needs {world} GPUs and the machine has {count}").format(
                world=world, count=job.machine.num_gpus
            ),
            where="--tp, --pp, --dp",
            remedy=_("their product must not be larger than the number of GPUs"),
        )
    return job
