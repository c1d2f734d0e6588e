"""Whatever flags are thrown at the room, it answers or refuses with a sentence."""

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ullage.engines import megatron
from ullage.errors import UllageError
from ullage.read.machine import parse_machine
from ullage.read.megatron_args import job_from_megatron_args, job_from_megatron_text, smallest_world
from ullage.read.megatron_flags import READ

BASE = {
    "num-layers": 4,
    "hidden-size": 64,
    "num-attention-heads": 4,
    "seq-length": 128,
    "max-position-embeddings": 128,
    "micro-batch-size": 1,
    "vocab-size": 1000,
    "bf16": True,
}
VALUES = st.one_of(
    st.integers(-2, 70),
    st.booleans(),
    st.sampled_from(["", "none", "fp32", "M*E-", "Et|tt|tL", "([0]*1+[1]*3)", "selective", "full", "2.5", "x" * 50]),
)
MACHINE = parse_machine("8xH100-80GB-SXM")


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(sorted(READ)), VALUES, max_size=6))
def test_flags(extra):
    args = {**BASE, **extra}
    try:
        smallest_world(args)
        step = megatron.step(job_from_megatron_args(args, machine=MACHINE))
    except UllageError as error:
        assert "\n" not in str(error)
        return
    for rank in step.ranks:
        assert 0 <= rank.peak.allocated.low_bytes <= rank.peak.allocated.bytes <= rank.peak.allocated.high_bytes


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=300))
def test_text(text):
    try:
        job_from_megatron_text(text, machine=MACHINE)
    except UllageError as error:
        assert str(error)
