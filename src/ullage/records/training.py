"""Training records: the job in a record's words → :class:`TrainingJob` → what the engine room says of a step."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ullage.account.adapters.names import method_names
from ullage.catalog import models as catalog
from ullage.engines.routing import parse_routing
from ullage.engines.serving import Amount
from ullage.engines.training import TRAINING_ENGINES, TrainingRank, TrainingStep, step
from ullage.errors import InputError
from ullage.i18n import _
from ullage.ledger import Term
from ullage.read.evaluation_words import evaluation_of
from ullage.read.machine import parse_machine
from ullage.read.rlhf_words import is_kind, parse_rlhf, rlhf_of
from ullage.records import words
from ullage.records.adapters import adapters_of, method_of, script_flags
from ullage.records.compare import NotComparableError, Prediction
from ullage.records.frameworks import framework_flags
from ullage.records.megatron import LAYER_KEYS, megatron_job, with_layers
from ullage.records.models import record_model
from ullage.records.schema import Record
from ullage.spec.machine import Machine
from ullage.spec.model import Attention, Layer, Model
from ullage.spec.rlhf import Rlhf
from ullage.spec.training import Evaluation, Precision, Recompute, TrainingJob, TrainingParallel
from ullage.units import canonical_dtype

#: Stands in for a card that is not known: what depends on its size is not judged.
STAND_IN_GPU = "H200"
_METHODS_OF_ENGINE = {"litgpt": ("llama_adapter", "llama_adapter_v2")}
_OVERRIDES = LAYER_KEYS | {"num_hidden_layers", "vocab_size", "tie_word_embeddings", "qkv_bias"}
#: Names of frozen bases that a record may write in ``precision.params`` instead.
_QUANTISED = ("nf4", "fp4", "int8", "gptq")


def predict(record: Record) -> Prediction:
    """Predict a training record.

    Raises:
        NotComparableError: the record lacks what a prediction needs.
        UllageError: the program cannot predict it.
    """
    if record.engine not in TRAINING_ENGINES:
        raise NotComparableError(_("no training engine {engine}").format(engine=record.engine[:40]))
    job, not_comparable = record_job(record)
    answer: TrainingStep = step(job)
    in_order = sorted(answer.ranks, key=lambda rank: rank.rank)
    return Prediction(
        engine=job.engine,
        figures=figures(answer.ranks),
        ranks=tuple(_of_rank(rank) for rank in in_order for _copy in range(rank.num_ranks)),
        starts=None,
        not_comparable=not_comparable,
    )


def record_job(record: Record) -> tuple[TrainingJob, dict[str, str]]:
    """Return the job of a record, and which quantities of it cannot be judged and why."""
    fields = record.job
    native = megatron_job(record)
    if native is not None:
        return native, {}
    not_comparable: dict[str, str] = {}
    num_gpus, machine = _machine(record)
    rlhf, fields = _rlhf(fields, record.where)
    own = _METHODS_OF_ENGINE.get(record.engine, ())
    method, model = method_of(fields, own), _model(record)
    precision, base = _precision(fields, record.where)
    seq_len = words.integer(fields, "seq_len", record.where)
    flags = (*_flags(fields), *script_flags(record), *framework_flags(record))
    if seq_len is None and "seq_len_at_most" in dict(flags):
        seq_len = int(dict(flags)["seq_len_at_most"])
    if seq_len is None:
        not_comparable.update(dict.fromkeys(("max_allocated", "max_reserved", "device_used"), _("no sequence length")))
    job = TrainingJob(
        model=model,
        machine=machine,
        engine=record.engine,
        engine_version=str(fields.get("engine_version") or ""),
        parallel=_parallel(fields.get("parallel"), num_gpus, record.where),
        precision=precision,
        optimizer=str(fields.get("optimizer") or "adamw"),
        optimizer_impl=_one_of(fields, "optimizer_impl", ("fused", "foreach", "for_loop")),
        micro_batch_size=words.integer(fields, "micro_batch_size", record.where) or 1,
        seq_len=seq_len or 1,
        grad_accum=words.integer(fields, "grad_accum", record.where) or 1,
        packing=fields.get("packing") is True,
        recompute=replace(recompute(fields.get("recompute"), record.where), given="recompute" in fields),
        attention=_one_of(fields, "attention", ("flash", "sdpa", "eager", "unfused")),
        compile=fields.get("compile") is True,
        loss=_one_of(fields, "loss", ("plain", "fused", "chunked", "liger")),
        method=method,
        lora=None if method in own else adapters_of({**fields, "method": method}, record, model),
        rlhf=rlhf,
        routing_sigma=None if fields.get("routing") is None else parse_routing(str(fields["routing"]), "job.routing"),
        evaluation=_evaluation(fields, record.where),
        base_quantization=base,
        offload=tuple((str(what), str(where)) for what, where in _object(fields.get("offload"), "offload", record)),
        alloc_conf=str(fields.get("alloc_conf") or ""),
        flags=flags,
    )
    return job, not_comparable


def _rlhf(fields: Mapping[str, Any], where: str) -> tuple[Rlhf | None, Mapping[str, Any]]:
    """Return what the job says of preference or reinforcement training, and the fields with what is trained then.

    Raises:
        InputError: words that do not describe it.
    """
    said, method = fields.get("rlhf"), str(fields.get("method") or "")
    if said is None and not is_kind(method):
        return None, fields
    found = rlhf_of(said, f"{where}: rlhf") if isinstance(said, dict) else parse_rlhf(str(said or method), where)
    if is_kind(method):
        fields = {**fields, "method": "lora" if isinstance(fields.get("lora"), dict) else "full"}
    return found, fields


def _evaluation(fields: Mapping[str, Any], where: str) -> Evaluation | None:
    said = fields.get("evaluation")
    if said is None:
        return None
    return evaluation_of(said if isinstance(said, dict) else {"batch_size": said}, f"{where}: job.evaluation")


def _machine(record: Record) -> tuple[int, Machine]:
    """Return the GPUs and the machine; a card that is not known is stood in for."""
    num_gpus = words.integer(record.job, "num_gpus", record.where) or 1
    gpu = words.text(record.job, "gpu", record.where)
    try:
        return num_gpus, parse_machine(f"{num_gpus}x{gpu or STAND_IN_GPU}")
    except InputError:
        return num_gpus, parse_machine(f"{num_gpus}x{STAND_IN_GPU}")


def figures(ranks: tuple[TrainingRank, ...]) -> dict[str, Amount]:
    """Return the figures of the fullest rank, by the names of the truth files."""
    return _of_rank(max(ranks, key=lambda rank: rank.peak.device_used.bytes)) if ranks else {}


def _of_rank(rank: TrainingRank) -> dict[str, Amount]:
    """Return one rank's figures: each quantity at its own worst moment."""
    moments = rank.moments
    return {
        "max_allocated": _worst([moment.allocated for moment in moments]),
        "max_active": _worst([moment.allocated for moment in moments]),
        "max_reserved": _worst([moment.reserved for moment in moments]),
        "device_used": _worst([moment.device_used for moment in moments]),
        "allocated_after_step": _worst([rank.after_step.allocated]),
    }


def _worst(terms: list[Term]) -> Amount:
    return Amount(
        value=max(term.bytes for term in terms),
        low=max(term.low_bytes for term in terms),
        high=max(term.high_bytes for term in terms),
    )


def _model(record: Record) -> Model:
    """Return the model; overrides of catalog models are not followed but for what does not change its tensors."""
    overrides = record.job.get("model_overrides")
    value = record.job.get("model")
    if isinstance(overrides, dict) and isinstance(value, str):
        model = _overridden(value, overrides)
        if model is not None:
            return model
    return record_model(record)[0]


def _overridden(name: str, overrides: Mapping[str, Any]) -> Model | None:
    """Apply overrides that a model of the catalog takes as data: depth, vocabulary, tying, biases of q, k and v."""
    found = catalog.find(name)
    if found is None or not set(overrides) <= _OVERRIDES:
        return None
    model = catalog.load_entry(found)
    if overrides.get("qkv_bias") is False:
        model = replace(model, layers=tuple(_without_biases(layer) for layer in model.layers))
    if LAYER_KEYS & set(overrides):
        model = with_layers(model, overrides)
    layers = overrides.get("num_hidden_layers")
    vocabulary, tied = overrides.get("vocab_size"), overrides.get("tie_word_embeddings")
    if isinstance(layers, int) and 0 < layers <= len(model.layers):
        model = replace(model, layers=model.layers[:layers])
    if isinstance(vocabulary, int):
        model = replace(model, vocab_size=vocabulary)
    return replace(model, tied_embeddings=tied) if isinstance(tied, bool) else model


def _without_biases(layer: Layer) -> Layer:
    mixers = tuple(
        replace(mixer, q_bias=False, k_bias=False, v_bias=False) if isinstance(mixer, Attention) else mixer
        for mixer in layer.mixers
    )
    return replace(layer, mixers=mixers)


def _precision(fields: Mapping[str, Any], where: str) -> tuple[Precision, str | None]:
    """Return the number formats, and the quantisation of a frozen base."""
    value = fields.get("precision")
    if value is not None and not isinstance(value, dict):
        raise InputError(_("job.precision is not an object"), where=where)
    given = {key: item for key, item in (value or {}).items() if isinstance(item, str)}
    base = fields.get("base_quantization")
    base = base.lower() if isinstance(base, str) else None
    if given.get("params") in _QUANTISED:
        base = base or given["params"]
        given.pop("params")
    compute = canonical_dtype(given.get("compute", "bf16"))
    params = canonical_dtype(given.get("params", compute))
    adapted = fields.get("method") in method_names()
    small = "float32" if adapted else params
    return (
        Precision(
            compute=compute,
            params=params,
            grads=canonical_dtype(given.get("grads", small)),
            master=canonical_dtype(given["master"]) if "master" in given else None,
            moments=canonical_dtype(given.get("moments", small)),
        ),
        base,
    )


def _parallel(value: Any, num_gpus: int, where: str) -> TrainingParallel:
    if value is None:
        value = {}
    if not isinstance(value, dict):
        raise InputError(_("job.parallel is not an object"), where=where)
    sizes = {key: words.integer(value, key, where) or 1 for key in ("tp", "cp", "pp", "ep", "vpp")}
    fsdp = value.get("fsdp")
    schedule = value.get("schedule")
    return TrainingParallel(
        data_parallel_size=words.integer(value, "dp", where) or 1,
        tensor_parallel_size=sizes["tp"],
        sequence_parallel=value.get("sp") is True,
        context_parallel_size=sizes["cp"],
        pipeline_parallel_size=sizes["pp"],
        virtual_pipeline_parallel_size=sizes["vpp"],
        schedule=schedule if schedule in ("gpipe", "1f1b", "interleaved", "zero_bubble", "dualpipe") else None,
        expert_parallel_size=sizes["ep"],
        expert_tensor_parallel_size=words.integer(value, "etp", where),
        zero_stage=words.integer(value, "zero", where) or 0,
        fsdp=fsdp if fsdp in ("full_shard", "shard_grad_op", "hybrid") else None,
    )


def recompute(value: Any, where: str) -> Recompute:
    """Return what ``job.recompute`` says: a word or an object.

    Raises:
        InputError: it says something else.
    """
    if value in (None, "none", False):
        return Recompute()
    if value in ("full", "selective"):
        return Recompute(kind=value)
    if not isinstance(value, dict):
        raise InputError(_("{value} is no kind of recompute").format(value=repr(value)[:60]), where=where)
    if "every" in value:
        return Recompute(kind="full", every=words.integer(value, "every", where) or 1)
    if "modules" in value:
        return Recompute(kind="modules", modules=tuple(str(one) for one in value["modules"]))
    method = value.get("method")
    return Recompute(
        kind="full",
        num_layers=words.integer(value, "num_layers", where),
        method=method if method in ("block", "uniform") else None,
    )


def _flags(fields: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Return what the record says in words of the kernels that run."""
    said = " ".join(words.sentences(fields))
    flags = []
    if "fused kernels for RMSNorm, RoPE" in said:
        flags.append(("fused_kernels", "rms_norm,rope"))
    if "implementation: TE" in said:
        flags.append(("cross-entropy-fusion-impl", "te"))
    if "expert capacity factor 1, padded" in said:
        flags += [("moe-expert-capacity-factor", "1"), ("moe-pad-expert-input-to-capacity", "true")]
    if "cut cross entropy" in said:
        flags.append(("fused_kernels", ""))  # the loss alone is fused
    if "double quantization" in said:
        flags.append(("double_quantization", "true"))
    if "dropout (0.1 assumed)" in said:
        flags.append(("dropout", "0.1"))
    if "written out in Python" in said:
        flags.append(("written_out", "norm,activation"))
    longest = re.search(r"at most about (\d{1,7}) tokens", said)
    if longest:
        flags.append(("seq_len_at_most", longest.group(1)))
    return tuple(flags)


def _one_of(fields: Mapping[str, Any], key: str, known: tuple[str, ...]) -> Any:
    value = fields.get(key)
    return value if value in known else None


def _object(value: Any, key: str, record: Record) -> list[tuple[Any, Any]]:
    if value is None:
        return []
    if not isinstance(value, dict):
        raise InputError(_("{key} is missing or not an object").format(key=f"job.{key}"), where=record.where)
    return list(value.items())
