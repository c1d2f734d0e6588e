"""What changes cost in time: shares of a step with their sources."""

from __future__ import annotations

from ullage.i18n import _
from ullage.plan.advice.change import Cost
from ullage.spec.training import TrainingJob
from ullage.units import format_bytes

#: PCIe of 16 lanes, one direction: 128/130 of 16 and of 32 GT/s a lane (PCI-SIG base specification 4.0 and 5.0).
PCIE_BYTES_PER_S = {4: 16 * 16e9 / 8 * 128 / 130, 5: 16 * 32e9 / 8 * 128 / 130}
#: Share of it that copies reach, and share of the peak FLOP/s that a step reaches. Judgements, for an order of size.
COPY_EFFICIENCY = 0.8
COMPUTE_EFFICIENCY = 0.4

FREE = Cost(words=_("none"))
FUSED_LOSS = Cost(words=_("none, needs the kernel; usually faster"), source="Hsu et al. 2024, arXiv:2410.10989")
FLASH = Cost(words=_("none; faster"), slower=-0.1, source="Dao et al. 2022, arXiv:2205.14135")
COMPILED = Cost(words=_("minutes at the start, then faster"), source="torchtitan benchmarks")
SHARDED_STATES = Cost(
    words=_("as much communication as before, in two halves"),
    slower=0.01,
    source="Rajbhandari et al. 2020, arXiv:1910.02054, 7.2.1",
)
SHARDED_PARAMETERS = Cost(
    words=_("half as much communication again"), slower=0.05, source="Rajbhandari et al. 2020, arXiv:1910.02054, 7.2.2"
)
SEQUENCE_PARALLEL = Cost(
    words=_("none: the same bytes are sent"), source="Korthikanti et al. 2022, arXiv:2205.05198, 4.2.2"
)
SELECTIVE = Cost(
    words=_("a few per cent of time"), slower=0.05, source="Korthikanti et al. 2022, arXiv:2205.05198, table 4"
)
FULL_RECOMPUTE = Cost(
    words=_("about a third more compute: 4/3 of forward and backward"),
    slower=1 / 3,
    source="Chen et al. 2016, arXiv:1604.06174",
)
HALF_RECOMPUTE = Cost(words=_("about a sixth more compute"), slower=1 / 6, source="Chen et al. 2016, arXiv:1604.06174")
EIGHT_BITS = Cost(
    words=_("a little accuracy: measure it"), kind="accuracy", source="Dettmers et al. 2022, arXiv:2110.02861"
)
SHORT_MOMENTS = Cost(words=_("a little accuracy: measure it"), kind="accuracy")
QUANTISED_BASE = Cost(
    words=_("some accuracy, and slower products"),
    slower=0.2,
    kind="accuracy",
    source="Dettmers et al. 2023, arXiv:2305.14314",
)
ADAPTERS = Cost(words=_("only adapters are trained: another method"), kind="function")
SHORTER = Cost(words=_("longer samples are cut: other data"), kind="function")
PRECOMPUTED = Cost(words=_("one pass over the data before training; its own passes drop out"))
WAKING = Cost(words=_("seconds for every generation: weights and graphs come back"), slower=0.05)
FEWER_AT_ONCE = Cost(words=_("fewer completions at once, slower generation"), slower=0.1)
SHORTER_EVALUATION = Cost(words=_("none for the step; longer evaluations"))
LESS_RESERVE = Cost(words=_("less is left for what was not foreseen"), slower=0.0, kind="accuracy")


def smaller_batch(times: int) -> Cost:
    """Smaller products use a GPU less well: 3 % for each halving, a judgement."""
    return Cost(words=_("smaller products, somewhat slower"), slower=0.03 * max(1, times.bit_length() - 1))


def wider(axis: str) -> Cost:
    """More ranks along an axis talk more: a judgement of the order of size."""
    shares = {"tensor": 0.1, "expert": 0.08, "context": 0.06}
    words = {
        "tensor": _("activations are summed over twice as many GPUs in every layer"),
        "expert": _("tokens travel to twice as many GPUs in every layer"),
        "context": _("keys and values go around twice as many GPUs"),
    }
    return Cost(words=words[axis], slower=shares[axis])


def pipeline_bubble(job: TrainingJob, stages: int, passes: int, chunks: int = 1) -> Cost:
    """Return the idle time that a pipeline of ``stages`` adds.

    Formula: (p - 1) / (m v) of the time of the passes, p stages, m passes, v chunks a stage.
    Source: Narayanan et al. 2021, arXiv:2104.04473, 2.2.
    """
    parallel = job.parallel
    now = (parallel.pipeline_parallel_size - 1) / (job.grad_accum * parallel.virtual_pipeline_parallel_size)
    then = (stages - 1) / (passes * chunks)
    added = max(0.0, (1 + then) / (1 + now) - 1)
    words = _("{share:.0%} more idle time in the pipeline").format(share=added)
    return Cost(words=words, slower=added, source="Narayanan et al. 2021, arXiv:2104.04473, 2.2")


def over_pcie(job: TrainingJob, moved_bytes: float, num_active: int) -> Cost:
    """Return what it costs to move bytes between host and device in every step.

    Formula: bytes / (PCIe bandwidth x 0.8), beside 6 N tokens / (FLOP/s x 0.4) for the step.
    Symbols: N active parameters; tokens of a step per group of tensor, pipeline and context parallel ranks.
    Source: PCI-SIG; Kaplan et al. 2020, arXiv:2001.08361, 2.1 (6 N FLOPs a token). Known error: no overlap is counted.
    """
    gpu, parallel = job.machine.gpu, job.parallel
    generation = 5 if (gpu.compute_capability or (8, 0)) >= (9, 0) else 4
    seconds = moved_bytes / (COPY_EFFICIENCY * PCIE_BYTES_PER_S[generation])
    tokens = job.micro_batch_size * job.grad_accum * job.seq_len
    split = parallel.tensor_parallel_size * parallel.pipeline_parallel_size * parallel.context_parallel_size
    flops = dict(gpu.flops).get("bfloat16") or dict(gpu.flops).get("float16")
    slower = 0.5  # the card's speed is not known
    if flops:
        slower = seconds / (6 * num_active * tokens / split / (COMPUTE_EFFICIENCY * flops))
    words = _("{size} over PCIe in every step, about {seconds:.2g} s").format(
        size=format_bytes(moved_bytes), seconds=seconds
    )
    return Cost(words=words, slower=min(slower, 100.0), source="PCI-SIG base specification")
