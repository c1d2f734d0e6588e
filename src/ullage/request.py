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


def default_parallel(model: Model, machine: Machine) -> tuple[ServingParallel, tuple[str, ...]]:
    """Return the layout taken when none is given: tensor parallel within a node, pipeline over nodes."""
    heads = attention_heads(model)
    tensor = next(size for size in range(machine.gpus_per_node, 0, -1) if heads % size == 0)
    parallel = ServingParallel(tensor_parallel_size=tensor, pipeline_parallel_size=machine.num_nodes)
    if machine.num_gpus == 1:
        return parallel, ()
    parts = [_("tensor parallel over {count} GPUs").format(count=tensor)]
    if machine.num_nodes > 1:
        parts.append(_("pipeline parallel over {count} nodes").format(count=machine.num_nodes))
    sentence = _("layout not given: {parts}").format(parts=", ".join(parts))
    idle = machine.num_gpus - tensor * machine.num_nodes
    if idle:
        sentence += _("; {count} GPUs stay idle, because {tp} does not divide {heads} heads").format(
            count=idle, tp=machine.gpus_per_node, heads=heads
        )
    return parallel, (sentence,)


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
