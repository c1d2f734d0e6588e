"""Targets of adapters: ends of names, and patterns of whole names."""

import time

import pytest

from ullage.account.adapters.naming import is_named
from ullage.errors import InputError

GEMMA = r"model.language_model.layers.[\d]+.(_checkpoint_wrapped_module.)?(mlp|self_attn).(up|down|gate|q|k|v|o)_proj"


def test_names_end_a_module() -> None:
    assert is_named("self_attn.q_proj", ("q_proj",)) and is_named("self_attn.q_proj", ("self_attn.q_proj",))
    assert not is_named("self_attn.fq_proj", ("q_proj",)) and not is_named("mlp.up_proj", ("self_attn.up_proj",))


def test_a_pattern_matches_the_whole_name() -> None:
    assert is_named("self_attn.q_proj", (GEMMA,)) and is_named("mlp.down_proj", (GEMMA,))
    assert not is_named("self_attn.q_norm", (GEMMA,)) and not is_named("experts.mlp.down_proj", (GEMMA,))
    assert is_named("self_attn.q_proj", (r".*\.(q|v)_proj",)) and not is_named("self_attn.k_proj", (r".*\.(q|v)_proj",))


@pytest.mark.parametrize("target", ["(", "[", "a{99999999999}", "(a+)+$", "(.*)*x", "q" * 400 + "*"])
def test_what_is_no_pattern_or_has_no_bounds_is_refused_at_once(target: str) -> None:
    before = time.perf_counter()
    with pytest.raises(InputError):
        is_named("self_attn.q_proj", (target,))
    assert time.perf_counter() - before < 1
