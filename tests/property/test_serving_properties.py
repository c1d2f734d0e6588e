"""What holds for every serving job, whatever the model, the engine and the layout."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
from fuzzing import CONFIGS
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from ullage.account.parameters import Role
from ullage.account.sharding import RankShare, layer_share, whole
from ullage.account.weights import weights_term
from ullage.engines.serving import EngineStart, start
from ullage.errors import UllageError
from ullage.ledger import Ledger, Term
from ullage.read.hf_config import read_config_object
from ullage.read.machine import parse_machine
from ullage.spec.codec import decode_model, encode
from ullage.spec.model import Model, MoEFFN
from ullage.spec.serving import ServingJob, ServingParallel
from ullage.units import plain

FAMILIES = [str(config["model_type"]) for config in CONFIGS]
ENGINES = ("vllm", "sglang", "llamacpp")
CHECK = settings(max_examples=60, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))


@lru_cache(maxsize=64)
def model_of(family: str) -> Model:
    config = next(config for config in CONFIGS if config["model_type"] == family)
    return read_config_object(config, where=family, name=family, assume=True)


def test_every_config_of_this_suite_is_read() -> None:
    for family in FAMILIES:
        assert model_of(family).layers


@st.composite
def jobs(draw: st.DrawFn, *, engines: tuple[str, ...] = ENGINES, tp: tuple[int, ...] = (1, 2, 4)) -> ServingJob:
    engine = draw(st.sampled_from(engines))
    size = draw(st.sampled_from(tp)) if engine != "llamacpp" else 1
    pipeline = draw(st.sampled_from([1, 2])) if engine != "llamacpp" else 1
    return ServingJob(
        model=model_of(draw(st.sampled_from(FAMILIES))),
        machine=parse_machine(f"{size * pipeline}x{draw(st.sampled_from(['H200', 'A100-40GB', '24GiB']))}"),
        engine=engine,
        engine_version="",
        parallel=ServingParallel(
            tensor_parallel_size=size,
            pipeline_parallel_size=pipeline,
            expert_parallel=draw(st.booleans()) if engine != "llamacpp" else False,
        ),
        max_model_len=draw(st.sampled_from([None, 512, 4096])),
        max_num_seqs=draw(st.sampled_from([None, 1, 64])),
        max_num_batched_tokens=draw(st.sampled_from([None, 512, 2048])),
        kv_cache_dtype=draw(st.sampled_from([None, "auto"])),
        enforce_eager=draw(st.sampled_from([None, True, False])),
    )


def started(job: ServingJob) -> EngineStart:
    """Start the job; one that is refused with a sentence says nothing of the property."""
    try:
        return start(job)
    except UllageError:
        assume(False)
        raise AssertionError from None


def ledgers(answer: EngineStart) -> list[Ledger]:
    return [one.ledger for one in answer.ranks]


def weights_of(answer: EngineStart) -> list[int]:
    found: list[int] = []
    for one in answer.ranks:
        term = one.ledger.find("weights")
        assert term is not None
        found += [term.bytes] * one.num_ranks
    return found


@pytest.mark.parametrize("engine", ENGINES)
def test_most_jobs_of_this_suite_start(engine: str) -> None:
    """Without this, the properties below could hold because every job is refused."""
    refused = []
    for family in FAMILIES:
        job = ServingJob(model=model_of(family), machine=parse_machine("1xH200"), engine=engine, engine_version="")
        try:
            start(replace(job, max_model_len=4096))
        except UllageError as error:
            refused.append(f"{family}: {error}")
    assert len(refused) <= len(FAMILIES) // 3, refused


def check_sums(term: Term) -> None:
    assert term.low_bytes <= term.bytes <= term.high_bytes
    assert term.bytes >= 0, term.name
    if term.children:
        assert term.bytes == sum(child.bytes for child in term.children), term.name
        for child in term.children:
            check_sums(child)


@CHECK
@given(job=jobs())
def test_ledgers_add_up_and_no_term_is_negative(job: ServingJob) -> None:
    answer = started(job)
    assert sum(one.num_ranks for one in answer.ranks) >= 1
    for ledger in ledgers(answer):
        check_sums(ledger.device_used)
        assert ledger.device_used.bytes == (
            ledger.allocated.bytes + ledger.reserved_overhead.bytes + ledger.outside.bytes
        )
    for name, amount in answer.figures.items():
        assert amount.low <= amount.value <= amount.high, name


@CHECK
@given(job=jobs(engines=("vllm", "sglang"), tp=(1, 2)))
def test_more_tensor_parallelism_never_adds_weights_to_a_rank(job: ServingJob) -> None:
    narrow = started(job)
    size = job.parallel.tensor_parallel_size * 2
    machine = parse_machine(f"{size * job.parallel.pipeline_parallel_size}xH200")
    wide = started(replace(job, machine=machine, parallel=replace(job.parallel, tensor_parallel_size=size)))
    assert max(weights_of(wide)) <= max(weights_of(narrow))


@CHECK
@given(job=jobs(), data=st.data())
def test_more_tokens_never_cost_less_cache(job: ServingJob, data: st.DataObject) -> None:
    answer = started(job)
    tokens = data.draw(st.integers(1, 100_000))
    more = tokens + data.draw(st.integers(0, 10_000))
    assert 0 <= answer.kv.bytes_of_request(tokens) <= answer.kv.bytes_of_request(more)


@CHECK
@given(family=st.sampled_from(FAMILIES))
def test_models_survive_json(family: str) -> None:
    model = model_of(family)
    assert decode_model(json.loads(json.dumps(encode(model))), where="round trip") == model


@CHECK
@given(job=jobs(engines=("vllm", "sglang"), tp=(1, 2)))
def test_fit_json_survives_json(job: ServingJob) -> None:
    from ullage.fitting import fit_serving
    from ullage.report.json import fit_json

    try:
        answer: Any = fit_json(fit_serving(job, advise=False))
    except UllageError:
        assume(False)
    assert json.loads(json.dumps(answer, allow_nan=False)) == answer


def shares(model: Model, cuts: list[int]) -> list[RankShare]:
    last = len(cuts) - 2
    return [
        replace(
            whole(model),
            layers=(cuts[stage], cuts[stage + 1]),
            embedding=stage == 0,
            head=stage == last,
            final=stage == last,
            mtp=stage == last,
            towers=stage == 0,
        )
        for stage in range(len(cuts) - 1)
    ]


@CHECK
@given(family=st.sampled_from(FAMILIES), data=st.data())
def test_pipeline_stages_hold_the_whole_model_together(family: str, data: st.DataObject) -> None:
    model = model_of(family)
    inner = data.draw(st.lists(st.integers(0, len(model.layers)), max_size=3))
    cuts = [0, *sorted(inner), len(model.layers)]
    parts = [weights_term(model, share).bytes for share in shares(model, cuts)]
    copies = 0
    if model.tied_embeddings and len(cuts) > 2:  # the head of the last stage is a copy of the first stage's embedding
        copies = next(t.bytes for t in weights_term(model, whole(model)).children if t.name == "embedding")
    assert sum(parts) == weights_term(model, whole(model)).bytes + copies


def components(model: Model, share: RankShare) -> dict[str, int]:
    return {term.name: term.bytes for term in weights_term(model, share, quantization=None).children}


@CHECK
@given(family=st.sampled_from(FAMILIES), tp=st.sampled_from([1, 2]), ep=st.sampled_from([1, 2, 4]))
def test_sharding_loses_no_byte(family: str, tp: int, ep: int) -> None:
    """Without quantisation every split axis divides here: tp x ep ranks hold each expert once, and no tensor less."""
    model = model_of(family)
    experts = {block.num_experts for layer in model.layers for block in layer.ffns if isinstance(block, MoEFFN)}
    assume(not experts or all(count % ep == 0 for count in experts))
    local = min(experts) // ep if experts else None
    share = replace(
        whole(model),
        attention_tp=tp,
        dense_tp=tp,
        shared_expert_tp=tp,
        expert_tp=tp,
        vocab_tp=tp,
        head_tp=tp,
        num_local_experts=local,
        mtp=False,
    )
    one, rank = components(model, replace(whole(model), mtp=False)), components(model, share)
    for name, size in one.items():
        ranks = tp * (ep if name == "routed_experts" else 1)
        held = rank[name] * ranks
        assert held >= size, name
        if name in ("routed_experts", "dense_ffn", "shared_experts", "embedding", "lm_head"):
            expected = replicated(model, name, expert=False) * (ranks - 1) + replicated(model, name) * (tp - 1)
            assert held - size == expected, name


def replicated(model: Model, component: str, *, expert: bool = True) -> int:
    """Bytes of a component's tensors that tensor parallelism does not split: of the experts (output biases, which
    expert parallelism does spread), or the others (hash tables, gates)."""
    return sum(
        plain(local.parameter.dtype or model.dtype).stored_bytes(local.shape) * local.copies
        for layer in model.layers
        for local in layer_share(layer, model.hidden_size, whole(model))
        if local.component == component
        and local.parameter.split == "none"
        and (local.parameter.role is Role.EXPERT) is expert
    )
