"""Laws of parameter-efficient methods, whatever the method, the rank and the model."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ullage.account.adapters.names import method_names, rule_of
from ullage.account.adapters.whole import solved_for, trained_tensors
from ullage.engines.training import step
from ullage.errors import InputError
from ullage.read.adapter_words import adapter_config, parse_adapters
from ullage.read.machine import parse_machine
from ullage.read.model_source import load_model
from ullage.spec.model import Model
from ullage.spec.training import Lora, Precision, Recompute, TrainingJob

LAWS = settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
OTHERS = [name for name in method_names() if name not in ("lora", "qlora", "dora")]
#: Ranks of which more may be less: OFT's is a number of blocks, RandLoRA's sum has the fewer parts the wider they are,
#: LoKr's wide matrix is written as one where a product of two would not be narrow any more.
WITH_RANK = ["lora", *(name for name in OTHERS if rule_of(name).rank and name not in ("oft", "randlora", "lokr"))]
#: Whole numbers of which more is more.
GROWING = {
    "prompt_tuning": "num_virtual_tokens",
    "p_tuning": "num_virtual_tokens",
    "prefix_tuning": "num_virtual_tokens",
    "adaption_prompt": "adapter_len",
    "trainable_tokens": "num_tokens",
    "vblora": "num_vectors",
    "fourierft": "n_frequency",
    "waveft": "n_frequency",
    "unilora": "theta_d_length",
    "boft": "boft_n_butterfly_factor",
    "gralora": "hybrid_r",
}
MODELS = ["llama-3.2-1b", "qwen3-0.6b", "mistral-7b-v0.3"]


@lru_cache
def model_of(name: str) -> Model:
    model = load_model(name)
    return replace(model, layers=model.layers[:3])


def lora_of(name: str, rank: int | None = None, **options: int) -> Lora:
    if name == "lora":
        return Lora(rank=rank or 8, targets=("q_proj", "v_proj"))
    rule = rule_of(name)
    return Lora(kind=name, rank=rule.rank if rank is None else rank, targets=(), options=tuple(options.items()))


def job_of(model: Model, lora: Lora, **changes: object) -> TrainingJob:
    first = TrainingJob(
        model=model,
        machine=parse_machine("1xH100"),
        engine="hf_trainer",
        precision=Precision(grads="float32"),
        seq_len=512,
        method=lora.kind,
        lora=lora,
    )
    return replace(first, **changes)  # type: ignore[arg-type]


def needs(job: TrainingJob) -> tuple[int, int]:
    """Return (peak, after a step), each allocated."""
    rank = step(job).ranks[0]
    return max(one.allocated.bytes for one in rank.moments), rank.after_step.allocated.bytes


@pytest.mark.parametrize("name", WITH_RANK)
@LAWS
@given(
    model=st.sampled_from(MODELS),
    ranks=st.lists(st.integers(1, 128), min_size=2, max_size=2, unique=True),
    engine=st.sampled_from(["hf_trainer", "single"]),
)
def test_a_higher_rank_never_needs_less(name: str, model: str, ranks: list[int], engine: str) -> None:
    low, high = (needs(job_of(model_of(model), lora_of(name, rank), engine=engine)) for rank in sorted(ranks))
    assert low[0] <= high[0] and low[1] <= high[1]


@pytest.mark.parametrize("name", GROWING)
@LAWS
@given(model=st.sampled_from(MODELS), values=st.lists(st.integers(1, 300), min_size=2, max_size=2, unique=True))
def test_more_of_a_setting_never_needs_less(name: str, model: str, values: list[int]) -> None:
    if name == "boft":
        values = [1, 2]
    low, high = (needs(job_of(model_of(model), lora_of(name, **{GROWING[name]: value}))) for value in sorted(values))
    assert low[0] <= high[0] and low[1] <= high[1]


@pytest.mark.parametrize("name", ["lora", *OTHERS])
@LAWS
@given(
    model=st.sampled_from(MODELS),
    batch=st.integers(1, 4),
    length=st.integers(16, 1500),
    recompute=st.booleans(),
    engine=st.sampled_from(["hf_trainer", "single"]),
)
def test_every_ledger_is_sound(name: str, model: str, batch: int, length: int, recompute: bool, engine: str) -> None:
    changes = {
        "micro_batch_size": batch,
        "seq_len": length,
        "engine": engine,
        "recompute": Recompute(kind="full" if recompute else "none"),
    }
    answer = step(job_of(model_of(model), lora_of(name), **changes))
    for ledger in (*answer.ranks[0].moments, answer.ranks[0].after_step):
        for term in (ledger.allocated, *ledger.allocated.children):
            assert 0 <= term.low_bytes <= term.bytes <= term.high_bytes, term
        assert ledger.allocated.bytes == sum(term.bytes for term in ledger.allocated.children)
    longer = job_of(model_of(model), lora_of(name), **{**changes, "seq_len": length + 64})
    assert needs(longer)[0] >= answer.ranks[0].peak.allocated.bytes * 0.999


@pytest.mark.parametrize("name", [name for name in OTHERS if rule_of(name).targets and name != "trainable_tokens"])
@pytest.mark.parametrize("model", MODELS)
def test_more_targets_never_need_less(name: str, model: str) -> None:
    norms = name == "ln_tuning"
    few = ("input_layernorm",) if norms else ("v_proj",)
    many = (*few, "post_attention_layernorm") if norms else (*few, "q_proj", "o_proj")
    low, high = (needs(job_of(model_of(model), replace(lora_of(name), targets=each))) for each in (few, many))
    assert low[1] <= high[1] and low[0] <= high[0] * 1.001


@pytest.mark.parametrize("name", WITH_RANK[1:])
@LAWS
@given(model=st.sampled_from(MODELS), rank=st.integers(1, 200))
def test_a_stated_count_gives_the_rank_back(name: str, model: str, rank: int) -> None:
    lora = lora_of(name, rank)
    count = trained_tensors(model_of(model), lora).num_elements
    found = solved_for(model_of(model), lora_of(name), count)
    assert trained_tensors(model_of(model), replace(found, num_parameters=None)).num_elements == count or (
        found.num_parameters == count
    )
    if rule_of(name).solved == "rank" and name not in ("psoft", "tinylora", "vblora", "unilora"):
        assert found.rank == rank


WORDS = st.text(alphabet="abcdqrv_=,+0123456789.-", max_size=40)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(method=st.sampled_from(["lora", "dora", *OTHERS]) | WORDS, text=WORDS | st.none())
def test_any_words_are_adapters_or_one_sentence(method: str, text: str | None) -> None:
    try:
        lora, kind = parse_adapters(method, text)
    except InputError as error:
        assert "\n" not in str(error)
        return
    assert (lora is None) == (kind == "full")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 10**12) | st.floats(allow_nan=True) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
KEYS = st.sampled_from(
    ["r", "target_modules", "modules_to_save", "lora_dropout", "init_r", "num_virtual_tokens", "vector_length",
     "block_size", "sparsity", "rank_pattern", "use_dora", "token_indices", "weight_tying", "variant"]
)  # fmt: skip


@settings(max_examples=300, deadline=None, derandomize=True)
@given(kind=st.sampled_from([name.upper() for name in method_names()]), values=st.dictionaries(KEYS, JSON, max_size=5))
def test_any_file_is_adapters_or_one_sentence(kind: str, values: dict[str, object]) -> None:
    try:
        lora, name = adapter_config({"peft_type": kind, **values}, where="adapter_config.json")
    except InputError as error:
        assert "\n" not in str(error)
        return
    assert name and lora.rank >= 0
