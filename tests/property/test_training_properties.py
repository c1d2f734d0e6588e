"""Laws that every training engine obeys, whatever the job."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ullage
from ullage.account.parameters import count
from ullage.catalog.models import find, load_entry
from ullage.engines.training import TrainingStep, step
from ullage.errors import InputError, UllageError
from ullage.ledger import Ledger, Term
from ullage.read.machine import parse_machine
from ullage.read.training_words import RECIPES, parse_precision
from ullage.report.train_json import training_json
from ullage.spec.model import Model
from ullage.spec.training import Precision, Recompute, TrainingJob, TrainingParallel
from ullage.training_fit import fit_training

SCHEMA = json.loads((Path(ullage.__file__).parent / "schema" / "fit.json").read_text())
ENGINES = [
    "single",
    "hf_trainer",
    "ddp",
    "megatron",
    "fsdp1",
    "fsdp2",
    "torchtitan",
    "deepspeed",
    "litgpt",
    "torchtune",
]
MODELS = ["llama-3.2-1b", "qwen3-0.6b", "deepseek-v2-lite", "gpt2"]
LAWS = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@lru_cache
def model_of(name: str, num_layers: int = 4) -> Model:
    entry = find(name)
    assert entry is not None
    model = load_entry(entry)
    return replace(model, layers=model.layers[:num_layers], mtp=())


def layout(engine: str, num_gpus: int, tp: int = 1, pp: int = 1, zero: int = 0) -> TrainingParallel:
    return TrainingParallel(
        data_parallel_size=num_gpus // (tp * pp),
        tensor_parallel_size=tp,
        sequence_parallel=tp > 1,
        pipeline_parallel_size=pp,
        schedule="1f1b" if pp > 1 else None,
        zero_stage=zero,
        fsdp="full_shard" if engine in ("fsdp1", "fsdp2", "torchtitan") else None,
    )


@st.composite
def jobs(draw: st.DrawFn) -> TrainingJob:
    engine = draw(st.sampled_from(ENGINES))
    num_gpus = 1 if engine == "single" else draw(st.sampled_from([1, 2, 8]))
    tp = draw(st.sampled_from([1, 2])) if engine in ("megatron", "torchtitan") and num_gpus > 1 else 1
    pp = draw(st.sampled_from([1, 2])) if engine == "megatron" and num_gpus == 8 else 1
    zero = draw(st.sampled_from([0, 1, 2, 3])) if engine == "deepspeed" else draw(st.sampled_from([0, 1]))
    return TrainingJob(
        model=model_of(draw(st.sampled_from(MODELS))),
        machine=parse_machine(f"{num_gpus}xH100"),
        engine=engine,
        parallel=layout(engine, num_gpus, tp, pp, zero if engine in ("deepspeed", "megatron") else 0),
        precision=RECIPES[draw(st.sampled_from(["amp", "bf16", "bf16-mixed", "bf16-master", "fp32"]))],
        micro_batch_size=draw(st.integers(1, 4)),
        seq_len=draw(st.sampled_from([256, 512, 1024, 2048])),
        grad_accum=draw(st.sampled_from([1, 4])),
        recompute=Recompute(kind=draw(st.sampled_from(["none", "full"]))),
    )


def answer(job: TrainingJob) -> TrainingStep | None:
    """Return the step, or None where the engine says in one sentence that it does not do that."""
    try:
        return step(job)
    except UllageError as error:
        assert str(error)
        return None


def moments(found: TrainingStep) -> list[Ledger]:
    return [one for rank in found.ranks for one in (*rank.moments, rank.after_step)]


def check_term(term: Term) -> None:
    assert 0 <= term.bytes <= term.high_bytes and term.low_bytes <= term.bytes, term.name
    # Settings that a job does not state widen the range of the sum, and may do so downwards.
    assert term.low_bytes >= 0 or term.name == "unknown_settings", term.name
    if term.children:
        assert term.bytes == sum(child.bytes for child in term.children), term.name
    for child in term.children:
        check_term(child)


def peak(found: TrainingStep) -> int:
    return max(one.allocated.bytes for one in moments(found))


@LAWS
@given(job=jobs())
def test_no_term_is_negative_and_sums_add_up(job: TrainingJob) -> None:
    found = answer(job)
    if found is None:
        return
    assert sum(rank.num_ranks for rank in found.ranks) == job.machine.num_gpus
    for ledger in moments(found):
        check_term(ledger.device_used)
        assert ledger.allocated.low_bytes >= 0
        assert sum(term.bytes for term in ledger.terms()) == ledger.device_used.bytes
        assert ledger.allocated.bytes <= ledger.reserved.bytes <= ledger.device_used.bytes


@LAWS
@given(job=jobs())
def test_longer_sequences_and_larger_batches_never_need_less(job: TrainingJob) -> None:
    found = answer(job)
    if found is None:
        return
    for more in (
        replace(job, seq_len=2 * job.seq_len),
        replace(job, micro_batch_size=job.micro_batch_size + 1),
    ):
        after = answer(more)
        assert after is not None
        assert peak(after) >= peak(found)
        steady = found.ranks[0].after_step.find("weights"), after.ranks[0].after_step.find("weights")
        assert steady[0] is not None and steady[1] is not None
        assert steady[0].bytes == steady[1].bytes


@LAWS
@given(job=jobs())
def test_the_result_obeys_the_schema_and_survives_json(job: TrainingJob) -> None:
    try:
        values = training_json(fit_training(job, advise=False))
    except UllageError:
        return
    again = json.loads(json.dumps(values, allow_nan=False))
    assert again == json.loads(json.dumps(again))
    jsonschema.validate(again, SCHEMA)
    assert again["exit_code"] in (0, 3, 4)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("tp", "pp", "ep"), [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 1), (1, 1, 4), (1, 2, 2)])
def test_sharding_loses_no_byte_of_the_weights(name: str, tp: int, pp: int, ep: int) -> None:
    """Over all ranks of TP x PP x EP, the weights are the model's; what is replicated only adds."""
    model = model_of(name)
    if model.vocab_size % tp:
        model = replace(model, vocab_size=model.vocab_size // 2 * 2)
    mixture = count(model).active != count(model).total
    if ep > 1 and not mixture:
        pytest.skip("a dense model has no experts")
    world = tp * pp * ep
    parallel = replace(layout("megatron", world, tp, pp), expert_parallel_size=ep, expert_tensor_parallel_size=tp)
    job = TrainingJob(
        model=model, machine=parse_machine(f"{world}xH100"), engine="megatron", parallel=parallel, seq_len=256
    )
    whole = count(model).total * 2
    held = experts = 0
    for rank in step(job).ranks:
        weights = rank.after_step.find("weights")
        assert weights is not None
        held += weights.bytes * rank.num_ranks
    replicas = ep  # what is not an expert stands once per data-parallel rank
    tied_copy = model.vocab_size * model.hidden_size * 2 if model.tied_embeddings and pp > 1 else 0
    experts = _expert_bytes(model)
    least = experts + replicas * (whole - experts + tied_copy)
    assert least <= held <= least * 1.02 + (world - ep) * _replicated_bytes(model)


def _expert_bytes(model: Model) -> int:
    from ullage.account.parameters import Role, model_parameters

    return sum(
        2 * _elements(placed.parameter.shape) * placed.parameter.copies
        for placed in model_parameters(model)
        if placed.parameter.role is Role.EXPERT
    )


def _replicated_bytes(model: Model) -> int:
    """Bytes of tensors that tensor parallelism does not split: norms, biases, routers, MLA's down-projections."""
    from ullage.account.parameters import model_parameters

    return sum(
        4 * _elements(placed.parameter.shape) * placed.parameter.copies
        for placed in model_parameters(model)
        if placed.parameter.split == "none"
    )


def _elements(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


@pytest.mark.parametrize("name", ["llama-3.2-1b", "qwen3-0.6b"])
@pytest.mark.parametrize("num_gpus", [2, 8, 64])
def test_every_zero_stage_needs_no_more_between_steps(name: str, num_gpus: int) -> None:
    sizes = []
    for zero in (0, 1, 2, 3):
        job = TrainingJob(
            model=model_of(name),
            machine=parse_machine(f"{num_gpus}xH100"),
            engine="deepspeed",
            parallel=layout("deepspeed", num_gpus, zero=zero),
            precision=Precision(master="float32"),
            seq_len=256,
        )
        rank = step(job).ranks[0]
        final = next(one for one in rank.moments if one.moment == "optimizer step")
        sizes.append((rank.after_step.allocated.bytes, final.allocated.bytes))
    optimizer_steps = [one for _after, one in sizes]
    assert optimizer_steps == sorted(optimizer_steps, reverse=True)
    between = [after for after, _one in sizes]
    # Stage 3 keeps a flat partition of gradients between steps, which the others free.
    gradients = 2 * count(model_of(name)).total // num_gpus + 2**20
    assert between[0] >= between[1] >= between[2] >= between[3] - gradients


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["llama-3.2-1b", "qwen3-0.6b"])
@pytest.mark.parametrize("attention", ["flash", "unfused"])
def test_recompute_keeps_less(engine: str, name: str, attention: Any) -> None:
    kept = []
    for kind in ("none", "selective", "full"):
        num_gpus = 1 if engine in ("single", "litgpt") else 8  # litgpt recomputes whatever it shards
        job = TrainingJob(
            model=model_of(name, 8),
            machine=parse_machine(f"{num_gpus}xH100"),
            engine=engine,
            parallel=layout(engine, num_gpus),
            precision=parse_precision(None, engine)[0],
            seq_len=2048,
            recompute=Recompute(kind=kind),  # type: ignore[arg-type]
            attention=attention,
        )
        found = answer(job)
        if found is not None:
            kept.append(found_activations(found))
        else:
            assert kind == "selective" or attention == "unfused", "none and full are known to every engine"
    assert kept == sorted(kept, reverse=True)
    if len(kept) > 1:
        assert kept[-1] < kept[0]


def found_activations(found: TrainingStep) -> int:
    names = ("activations", "kept_activations")
    terms = [ledger.find(name) for ledger in moments(found) for name in names]
    return max(term.bytes for term in terms if term is not None)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("recompute", [Recompute(kind="modules", modules=("mlp",)), Recompute(kind="full", every=2)])
def test_recompute_is_followed_or_refused(engine: str, recompute: Recompute) -> None:
    num_gpus = 1 if engine in ("single", "litgpt") else 8
    job = TrainingJob(
        model=model_of("llama-3.2-1b", 8),
        machine=parse_machine(f"{num_gpus}xH100"),
        engine=engine,
        parallel=layout(engine, num_gpus),
        precision=parse_precision(None, engine)[0],
        seq_len=2048,
        recompute=recompute,
    )
    without = answer(replace(job, recompute=Recompute()))
    found = answer(job)
    assert without is not None
    assert found is None or found_activations(found) < found_activations(without)


@pytest.mark.parametrize("engine", ["fsdp1", "fsdp2", "torchtitan", "litgpt", "torchtune"])
def test_more_ranks_of_full_sharding_hold_less(engine: str) -> None:
    held = []
    for num_gpus in (1, 2, 4, 16, 256):
        parallel = replace(layout(engine, num_gpus), fsdp="full_shard")
        job = TrainingJob(
            model=model_of("llama-3.2-1b"),
            machine=parse_machine(f"{num_gpus}xH100"),
            engine=engine,
            parallel=parallel,
            precision=parse_precision(None, engine)[0],
            seq_len=256,
        )
        found = answer(job)
        assert found is not None
        held.append(found.ranks[0].after_step.allocated.bytes)
    assert held == sorted(held, reverse=True)


def test_an_engine_that_is_not_known_is_one_sentence() -> None:
    job = TrainingJob(model=model_of("gpt2"), machine=parse_machine("1xH100"), engine="nonsense")
    with pytest.raises(InputError, match="nonsense"):
        step(job)
