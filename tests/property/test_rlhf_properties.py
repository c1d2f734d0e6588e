"""Preference and reinforcement jobs: more models and longer rows never need less."""

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from ullage.engines.training import step
from ullage.errors import InputError
from ullage.read.machine import parse_machine
from ullage.read.model_source import load_model
from ullage.spec.rlhf import KINDS, ON_POLICY, REFERRED, Rlhf, Rollout
from ullage.spec.training import Lora, Recompute, TrainingJob, TrainingParallel

FULL = load_model("qwen2.5-0.5b")
MODEL = replace(FULL, layers=FULL.layers[:3])
LAYOUTS = {
    ("hf_trainer", "1xH100"): TrainingParallel(),
    ("hf_trainer", "8xH100"): TrainingParallel(data_parallel_size=8, fsdp="full_shard"),
    ("deepspeed", "8xH100"): TrainingParallel(data_parallel_size=8, zero_stage=3),
    ("fsdp2", "4xA100-80GB"): TrainingParallel(data_parallel_size=4, fsdp="full_shard"),
    ("megatron", "2xH100"): TrainingParallel(tensor_parallel_size=2, zero_stage=1),
}
JOBS = st.builds(
    lambda place, **given: TrainingJob(
        model=MODEL, machine=parse_machine(place[1]), engine=place[0], parallel=LAYOUTS[place], **given
    ),
    place=st.sampled_from(sorted(LAYOUTS)),
    micro_batch_size=st.integers(1, 4),
    seq_len=st.sampled_from([256, 1000, 4096]),
    grad_accum=st.sampled_from([1, 2, 4]),
    recompute=st.sampled_from([Recompute(), Recompute(kind="full")]),
    engine_version=st.sampled_from(["", "trl 0.14", "trl 0.19", "trl 1.16", "llamafactory", "ms-swift"]),
    packing=st.booleans(),
)


def peak(job):
    """Return the most allocated on the fullest rank; None where the rules refuse the job.

    Reserved bytes are no measure: a larger block may fit a segment that a smaller one leaves open.
    """
    try:
        return max(ledger.allocated.bytes for rank in step(job).ranks for ledger in rank.moments)
    except InputError:
        return None


def not_less(more, less):
    first, second = peak(more), peak(less)
    assert first is None or second is None or first >= second


def ask(job, kind, **said):
    return replace(job, rlhf=Rlhf(kind=kind, **said))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(job=JOBS, kind=st.sampled_from(REFERRED))
def test_a_reference_never_needs_less(job, kind):
    copied = ask(job, kind, reference="copy", completion_len=100)
    for other in ("precomputed", "none"):
        not_less(copied, ask(job, kind, reference=other, completion_len=100))
    adapted = replace(job, lora=Lora(rank=8, targets=("all-linear",)), method="lora")
    not_less(
        ask(adapted, kind, reference="copy", completion_len=100),
        ask(adapted, kind, reference="adapter", completion_len=100),
    )


@settings(max_examples=25, deadline=None, derandomize=True)
@given(job=JOBS)
def test_pairs_never_need_less_than_single_rows(job):
    not_less(ask(job, "dpo"), ask(job, "kto"))
    not_less(ask(job, "dpo"), ask(job, "rm"))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(job=JOBS)
def test_preference_never_needs_less_than_a_fused_loss_of_the_same_rows(job):
    """A loss that keeps no logits and no reference is the least that rows of this number can take."""
    rows = replace(job, micro_batch_size=job.micro_batch_size * (1 if job.packing else 2))
    states = step(replace(rows, loss="plain")).ranks[0].after_step.allocated.bytes
    try:
        found = step(ask(job, "dpo")).ranks[0].after_step.allocated.bytes
    except InputError:
        return
    assert found > states


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    job=JOBS,
    kind=st.sampled_from(ON_POLICY),
    fraction=st.sampled_from([0.1, 0.3, 0.6]),
    length=st.sampled_from([16, 128]),
)
def test_rollouts_and_completions_never_need_less(job, kind, fraction, length):
    def rolled(rollout, tokens):
        return ask(job, kind, rollout=rollout, completion_len=tokens)

    away = Rollout(engine="server")
    pool = Rollout(engine="vllm", memory_fraction=fraction)
    asleep = replace(pool, sleeps=True)
    not_less(rolled(asleep, length), rolled(away, length))
    not_less(rolled(replace(pool, memory_fraction=fraction + 0.2), length), rolled(pool, length))
    not_less(rolled(pool, 2 * length), rolled(pool, length))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(job=JOBS, kind=st.sampled_from(KINDS))
def test_sizes_grow_and_ranges_hold(job, kind):
    asked = ask(job, kind, completion_len=100)
    not_less(replace(asked, micro_batch_size=2 * asked.micro_batch_size), asked)
    try:
        ranks = step(asked).ranks
    except InputError:
        return
    for ledger in (one for rank in ranks for one in (*rank.moments, rank.after_step)):
        used = ledger.device_used
        assert 0 <= used.low_bytes <= used.bytes <= used.high_bytes
