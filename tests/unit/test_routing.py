"""Uneven routing: quantiles of the fullest rank, and the figures that they make."""

import random
import statistics
from dataclasses import replace

import pytest

from ullage.account.routing import SIGMAS, Routing, load_quantile, normal_quantile
from ullage.engines.routing import parse_routing
from ullage.engines.training import step
from ullage.errors import InputError
from ullage.read.machine import parse_machine
from ullage.read.model_source import load_model
from ullage.read.training_words import parse_precision, parse_recompute
from ullage.spec.training import TrainingJob, TrainingParallel
from ullage.training_fit import fit_training

QWEN, DEEPSEEK = load_model("qwen3-30b-a3b"), load_model("deepseek-v2-lite")
V3 = load_model("deepseek-v3")


def drawn(routing: Routing, share: float, runs: int) -> float:
    """The same quantile by drawing popularities; chance is left out (``num_choices`` is large)."""
    rng, found = random.Random(7), []
    per_rank = routing.num_experts // routing.num_ranks
    for _run in range(runs):
        loads = [0.0] * routing.num_ranks
        for _layer in range(routing.num_kept):
            popularity = [rng.lognormvariate(0, routing.sigma) for _expert in range(routing.num_experts)]
            mean = sum(popularity) / routing.num_ranks
            for rank in range(routing.num_ranks):
                loads[rank] += sum(popularity[rank * per_rank : (rank + 1) * per_rank]) / mean
        found.append(max(loads) / routing.num_kept)
    return sorted(found)[int(share * runs)]


@pytest.mark.parametrize(
    ("sigma", "experts", "ranks", "kept"), [(0.23, 64, 8, 1), (0.23, 64, 16, 4), (0.5, 64, 8, 2), (0.017, 32, 8, 1)]
)
def test_the_closed_form_is_what_drawing_gives(sigma, experts, ranks, kept):
    routing = Routing(sigma=sigma, num_experts=experts, num_ranks=ranks, num_choices=10**9, num_kept=kept)
    for share in (0.5, 0.95):
        assert load_quantile(routing, share) == pytest.approx(drawn(routing, share, 1500), rel=0.04)


def test_the_normal_quantile_is_that_of_the_library():
    for share in (1e-6, 0.05, 0.5, 0.975, 1 - 1e-9):
        assert normal_quantile(share) == pytest.approx(statistics.NormalDist().inv_cdf(share), abs=1e-6)


def test_loads_grow_with_width_ranks_and_share_and_shrink_with_layers_kept():
    one = Routing(sigma=0.2, num_experts=64, num_ranks=8, num_choices=4096 * 6)
    assert load_quantile(one, 0.95) < load_quantile(one, 0.99)
    assert load_quantile(one, 0.95) < load_quantile(replace(one, sigma=0.3), 0.95)
    assert load_quantile(one, 0.95) < load_quantile(replace(one, num_ranks=16), 0.95)
    assert load_quantile(one, 0.95) < load_quantile(replace(one, num_tried=10), 0.95)
    assert load_quantile(one, 0.95) > load_quantile(replace(one, num_kept=10), 0.95) >= 1
    assert load_quantile(replace(one, num_ranks=1), 0.99) == 1


def job(model=QWEN, engine="megatron", **changes):
    stated = {
        "model": model,
        "machine": parse_machine("16xH100"),
        "engine": engine,
        "parallel": TrainingParallel(data_parallel_size=16, expert_parallel_size=8, zero_stage=1),
        "precision": parse_precision(None, engine)[0],
        "seq_len": 4096,
    }
    if engine == "torchtitan":
        stated["parallel"] = replace(stated["parallel"], zero_stage=0, fsdp="full_shard")
    return TrainingJob(**{**stated, **changes})


@pytest.mark.parametrize("engine", ["megatron", "torchtitan"])
def test_the_fullest_rank_gets_fuller(engine):
    found = fit_training(job(engine=engine), advise=False).routing
    assert found.balancing == "auxiliary loss" and found.sigma == SIGMAS["auxiliary loss"]
    sizes = [found.balanced_bytes, *(one.device_used_bytes for one in found.quantiles)]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]
    wider = fit_training(job(engine=engine, routing_sigma=0.6), advise=False).routing
    assert wider.quantiles[0].device_used_bytes > found.quantiles[0].device_used_bytes


def test_an_expert_load_scales_the_rows_of_experts_alone():
    balanced, loaded = step(job()), step(job(expert_load=2.0))
    for one, other in zip(balanced.ranks[0].moments, loaded.ranks[0].moments, strict=True):
        terms = {term.name: term.bytes for term in other.allocated.children}
        for term in one.allocated.children:
            if term.name in ("weights", "gradients", "master_weights", "optimizer_moments"):
                assert terms[term.name] == term.bytes
    assert loaded.ranks[0].peak.allocated.bytes > balanced.ranks[0].peak.allocated.bytes


def test_a_bias_for_each_expert_balances_better():
    layout = TrainingParallel(data_parallel_size=16, expert_parallel_size=8, zero_stage=1)
    found = fit_training(job(model=V3, parallel=layout), advise=False).routing
    assert found.balancing == "bias" and found.quantiles[1].load < 1.05
    assert fit_training(job(model=DEEPSEEK), advise=False).routing.balancing == "auxiliary loss"


def test_a_single_layer_at_a_time_is_more_uneven_than_many_together():
    again = fit_training(job(recompute=parse_recompute("full")), advise=False).routing
    kept = fit_training(job(), advise=False).routing
    assert again.quantiles[0].load > kept.quantiles[0].load


def test_nothing_is_said_where_experts_are_not_spread():
    layout = TrainingParallel(data_parallel_size=16, zero_stage=1)
    assert fit_training(job(parallel=layout), advise=False).routing is None
    with pytest.raises(InputError, match="uneven routing without expert parallelism"):
        step(job(parallel=layout, routing_sigma=0.3))


@pytest.mark.parametrize(("text", "sigma"), [("bias", 0.017), ("auxiliary-loss", 0.23), ("0.5", 0.5), ("0", 0.0)])
def test_words(text, sigma):
    assert parse_routing(text) == sigma


@pytest.mark.parametrize("text", ["", "even", "-1", "nan", "inf", "4"])
def test_other_words_are_refused(text):
    with pytest.raises(InputError, match="no width of the experts' popularity"):
        parse_routing(text)
