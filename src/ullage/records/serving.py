"""Serving records: the job in a record's words → :class:`ServingJob` → what the engine room says of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from typing import Any

from ullage.engines.serving import SERVING_ENGINES, Amount, EngineStart
from ullage.errors import InputError
from ullage.i18n import _
from ullage.ledger import Ledger, Term
from ullage.read.machine import parse_machine
from ullage.records import words
from ullage.records.compare import NotComparableError, Prediction
from ullage.records.models import gguf_type_missing, record_model
from ullage.records.schema import Record
from ullage.spec.serving import ServingJob, ServingParallel

#: Engine as records write it (first word, lower case) -> engine room.
ENGINE_ROOMS = {
    "vllm": "vllm",
    "sglang": "sglang",
    "llamacpp": "llamacpp",
    "llama.cpp": "llamacpp",
    "ik_llama.cpp": "llamacpp",
    "ollama": "llamacpp",
}
#: Relatives that a room tells apart by the name of the job's engine.
RELATIVES = ("ik_llama.cpp", "ollama")
#: What follows from the size of the card, and so cannot be judged when the card is not known.
OF_THE_CARD = (
    "kv_cache",
    "kv_cache_tokens",
    "num_gpu_blocks",
    "max_concurrency",
    "available_before_weights",
    "available_after_weights",
    "device_used",
    "starts",
)
#: Stands in for a card that is not known; nothing that depends on it is judged.
STAND_IN_GPU = "H200"
#: Ledger terms that carry another name than the truth files' quantity.
_LEDGER_TOTALS = {"device_used": "device_used", "total": "device_used", "max_allocated": "allocated"}


def predict(record: Record) -> Prediction:
    """Predict a serving record.

    Raises:
        NotComparableError: the record lacks what a prediction needs, or no engine room is meant to know it.
        UllageError: the program cannot predict it.
    """
    room = _engine_room(record)
    job, not_comparable = record_job(record, room)
    answer: EngineStart = import_module(SERVING_ENGINES[room]).start(job)
    ranks = _by_rank(answer)
    return Prediction(
        engine=job.engine,
        figures=answer.figures,
        ranks=ranks,
        starts=answer.starts,
        reason=answer.reason or answer.doubt,
        doubt=answer.doubt,
        not_comparable=not_comparable,
    )


def record_job(record: Record, room: str) -> tuple[ServingJob, dict[str, str]]:
    """Return the job of a record, and which quantities of it cannot be judged and why."""
    fields = record.job
    flags = words.flags(fields.get("flags"), record.where)
    not_comparable: dict[str, str] = {}
    num_gpus = words.integer(fields, "num_gpus", record.where)
    if num_gpus == 0 and room != "llamacpp":
        raise NotComparableError(_("no GPU"))
    if num_gpus is None:
        raise NotComparableError(_("the number of GPUs is not known"))
    gpu = words.text(fields, "gpu", record.where)
    if gpu is None and num_gpus:
        not_comparable.update(dict.fromkeys(OF_THE_CARD, _("the card is not known")))
    if gpu is not None and "+" in gpu:
        raise NotComparableError(_("cards of several kinds in one job"))
    machine = parse_machine(f"{num_gpus or 1}x{gpu or STAND_IN_GPU}")
    if num_gpus == 0:
        machine = replace(machine, gpus_per_node=0)
    model, quantization = record_model(record)
    if quantization is None and gguf_type_missing(fields.get("quantization")):
        of_the_file = ("weights", "total", "device_used", "starts")
        not_comparable.update(dict.fromkeys(of_the_file, _("the GGUF type is not stated")))
    total, free = words.device_memory(gpu or "", flags)
    if free is not None:
        not_comparable["available_before_weights"] = _("stated by the job, not predicted")
    common = words.engine_settings(fields, flags, record.where)
    version = str(fields.get("engine_version") or "")
    first = record.engine.lower().split()[0]
    engine = first if first in RELATIVES else room
    fork = record.engine if record.engine.lower() not in (engine, room) else ""
    job = ServingJob(
        model=model,
        machine=machine,
        engine=engine,
        engine_version=" ".join(part for part in (fork, version) if part),
        parallel=_parallel(fields.get("parallel"), flags, num_gpus, record.where),
        quantization=quantization,
        device_total_bytes=total,
        device_free_bytes=free,
        native=str(flags.get("command", "")),
        **common,
    )
    return job, not_comparable


def _engine_room(record: Record) -> str:
    first = record.engine.lower().split()[:1]
    if not first or first[0] not in ENGINE_ROOMS:
        raise NotComparableError(_("no engine room for {engine}").format(engine=record.engine[:40]))
    return ENGINE_ROOMS[first[0]]


def _parallel(value: Any, flags: Mapping[str, str], num_gpus: int, where: str) -> ServingParallel:
    if value is None:
        value = {}
    if not isinstance(value, dict):
        raise InputError(_("job.parallel is not an object"), where=where)
    sizes = {key: words.integer(value, key, where) or 1 for key in ("tp", "pp", "dp", "dcp")}
    expert = value.get("ep")
    stages = flags.get("VLLM_PP_LAYER_PARTITION")
    return ServingParallel(
        tensor_parallel_size=sizes["tp"],
        pipeline_parallel_size=sizes["pp"],
        data_parallel_size=sizes["dp"],
        expert_parallel=bool(expert) and expert != 1,
        expert_parallel_size=None if isinstance(expert, bool) else words.integer(value, "ep", where),
        dp_attention=value.get("dp_attention") is True,
        decode_context_parallel_size=sizes["dcp"],
        pipeline_layers=words.layer_counts(stages, where) if stages else None,
    )


def _by_rank(answer: EngineStart) -> tuple[Mapping[str, Amount], ...]:
    """Spread the classes of equal ranks over rank numbers: a class starts at its ledger's rank and fills gaps."""
    classes = sorted(answer.ranks, key=lambda one: one.ledger.rank)
    places: dict[int, Mapping[str, Amount]] = {one.ledger.rank: ledger_figures(one.ledger) for one in classes}
    for one in classes:
        rank, left = one.ledger.rank, one.num_ranks - 1
        while left:
            rank += 1
            if rank not in places:
                places[rank] = places[one.ledger.rank]
                left -= 1
    return tuple(places[rank] for rank in sorted(places))


def ledger_figures(ledger: Ledger) -> dict[str, Amount]:
    """Return every named term of a ledger as an amount; equal names add up."""
    found: dict[str, Amount] = {}
    for term in ledger.device_used.walk():
        earlier = found.get(term.name)
        found[term.name] = _plus(earlier, term)
    for quantity, name in _LEDGER_TOTALS.items():
        if name in found:
            found.setdefault(quantity, found[name])
    return found


def _plus(earlier: Amount | None, term: Term) -> Amount:
    base = earlier or Amount(value=0, low=0, high=0)
    return Amount(value=base.value + term.bytes, low=base.low + term.low_bytes, high=base.high + term.high_bytes)
