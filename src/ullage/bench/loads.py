"""The three loads as scripts: lists of steps for training, of waves of requests for serving. No clock, no torch."""

from __future__ import annotations

from dataclasses import dataclass

#: Steps of the same shape that settle a process before the changes, and again after them.
STEADY_STEPS = 4
SETTLE_STEPS = 3
BURST_STEPS = 2
NUM_BURSTS = 2
NUM_TEETH = 2
#: Lengths of one tooth, as shares of the longest sequence: rising, then falling at once.
TOOTH = (0.125, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True, kw_only=True)
class ScriptStep:
    """One training step to run, or seconds to sit still (``label`` idle)."""

    label: str
    micro_batch: int = 0
    seq: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Wave:
    """``num_requests`` served with ``concurrency`` at a time, prompts of ``prompt_tokens``."""

    label: str
    concurrency: int
    num_requests: int
    prompt_tokens: int


def idle_script(micro_batch: int, seq: int, seconds: float) -> list[ScriptStep]:
    """Sit still as built, and again once a step has made the optimizer's states."""
    half = seconds / 2
    return [
        ScriptStep(label="idle", seconds=half),
        ScriptStep(label="first", micro_batch=micro_batch, seq=seq),
        ScriptStep(label="idle", seconds=half),
    ]


def steady_script(micro_batch: int, seq: int, num_steps: int) -> list[ScriptStep]:
    """Run one shape over and over."""
    return [ScriptStep(label="steady", micro_batch=micro_batch, seq=seq) for _number in range(num_steps)]


def changing_script(micro_batch: int, seq: int) -> list[ScriptStep]:
    """Ramp of the micro-batch, bursts, sawtooth of lengths, between steady steps of half the largest micro-batch."""
    half = max(1, micro_batch // 2)
    steady = [ScriptStep(label="steady", micro_batch=half, seq=seq)] * STEADY_STEPS
    settle = [ScriptStep(label="settle", micro_batch=half, seq=seq)] * SETTLE_STEPS
    burst = [ScriptStep(label="burst", micro_batch=micro_batch, seq=seq)] * BURST_STEPS
    ramp = [ScriptStep(label="ramp", micro_batch=size, seq=seq) for size in _rising(micro_batch)]
    teeth = [ScriptStep(label="sawtooth", micro_batch=micro_batch, seq=length) for length in tooth(seq)] * NUM_TEETH
    return [*steady, *ramp, *settle, *((*burst, *settle) * NUM_BURSTS), *teeth, *settle, *steady]


def changing_waves(concurrency: int, prompt_tokens: int, per_wave: int) -> list[Wave]:
    """Ramp of the concurrency, bursts, sawtooth of prompt lengths, between steady waves of half the concurrency."""
    half = max(1, concurrency // 2)

    def wave(label: str, at_a_time: int, tokens: int) -> Wave:
        count = max(per_wave, at_a_time)
        return Wave(label=label, concurrency=at_a_time, num_requests=count, prompt_tokens=tokens)

    steady, settle = wave("steady", half, prompt_tokens), wave("settle", half, prompt_tokens)
    ramp = [wave("ramp", size, prompt_tokens) for size in _rising(concurrency)]
    bursts = [wave("burst", concurrency, prompt_tokens), settle] * NUM_BURSTS
    teeth = [wave("sawtooth", concurrency, length) for length in tooth(prompt_tokens)] * NUM_TEETH
    return [steady, *ramp, *bursts, *teeth, steady]


def tooth(longest: int) -> list[int]:
    """Return the lengths of one tooth, each at least one, none twice."""
    return sorted({max(1, round(longest * share)) for share in TOOTH})


def _rising(largest: int) -> list[int]:
    """Return about six sizes from one up to ``largest``."""
    return sorted({max(1, -(-largest * number // 6)) for number in range(1, 7)})
