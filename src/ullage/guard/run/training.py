"""The next smaller plan of a training job: a smaller pass with the same global batch, then recompute."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ullage.guard.plan import Plan, Value
from ullage.guard.run.deaths import Death
from ullage.guard.run.programs import Trainer, llama_factory_file, trainer_of
from ullage.guard.run.words import Words
from ullage.guard.sizes import known_shapes
from ullage.i18n import _

ALLOC_CONF = "expandable_segments:True"
ALLOC_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
_WORKERS = (("dataloader_num_workers", "num_workers"), "--dataloader_num_workers")


@dataclass(frozen=True, kw_only=True)
class Smaller:
    """One change: a sentence, the knobs of the plan, and the words of the command line that change with them.

    ``flags``: (spellings, flag to add, value). ``notes``: what could not be carried over.
    """

    sentence: str
    knobs: tuple[tuple[str, Value], ...]
    flags: tuple[tuple[tuple[str, ...], str, str], ...] = ()


def smaller_micro_batch(micro: int, reached: int = 0) -> int:
    """Return the largest divisor of a micro-batch that is at most half of it: 8 → 4, 6 → 3, 5 → 1.

    A divisor keeps the global batch: micro x accumulation stays the same. ``reached``: what a guard in the job has
    gone down to already, which is to be halved in its place.
    """
    return next((size for size in range((reached or micro) // 2, 0, -1) if micro % size == 0), 1)


def next_smaller(words: Sequence[str], death: Death, plan: Plan) -> Smaller | None:
    """Return the next smaller plan, None when nothing that can be shrunk is known."""
    return next(_candidates(words, death, plan), None)


def _candidates(words: Sequence[str], death: Death, plan: Plan) -> Iterator[Smaller]:
    found = death.found
    pieces = found is not None and found.cause == "fragmentation" and found.allocator == "pytorch"
    if pieces and plan.get("alloc_conf") is None and "alloc_conf" not in dict(found.settings if found else ()):
        sentence = _("the memory is there in pieces: let segments grow ({setting})").format(setting=ALLOC_CONF)
        yield Smaller(sentence=sentence, knobs=(("alloc_conf", ALLOC_CONF),))
    if found is not None and found.phase == "load":
        return  # the weights themselves are too large: no batch changes that
    if death.kind == "host_oom":
        yield from _fewer_workers(words)
    trainer = trainer_of(words)
    yield from _micro_batch(words, trainer, plan)
    yield from _recompute(words, trainer, plan)
    if plan.get("offload") is False:
        yield Smaller(sentence=_("optimizer states in the host's memory"), knobs=(("offload", True),))


def _fewer_workers(words: Sequence[str]) -> Iterator[Smaller]:
    line = Words(words)
    workers = line.whole(_WORKERS[0])
    if workers:
        sentence = _("fewer workers of the data loader: {old} becomes {new}").format(old=workers, new=workers // 2)
        yield Smaller(
            sentence=sentence,
            knobs=(("num_workers", workers // 2),),
            flags=((_WORKERS[0], _WORKERS[1], str(workers // 2)),),
        )


def _micro_batch(words: Sequence[str], trainer: Trainer | None, plan: Plan) -> Iterator[Smaller]:
    guarded = min(known_shapes(plan).values(), default=0)  # what the guard in the job has gone down to
    known = plan.get("micro_batch")
    if trainer is None and known is None and guarded > 1:
        new = smaller_micro_batch(guarded)
        sentence = _("micro-batch {old} becomes {new}: the guard in the job keeps the global batch")
        yield Smaller(sentence=sentence.format(old=guarded, new=new), knobs=(("micro_batch", new),))
        return
    if trainer is None:
        micro, passes = (known, plan.get("grad_accum", 1)) if known is not None else _from_file(words)
        flags = _file_flags(words)
    else:
        line = Words(words, assignments=trainer.name == "torchtune")
        micro = line.whole(trainer.micro) or trainer.micro_default
        passes = line.whole(trainer.accumulation) or trainer.accumulation_default
        flags = ((trainer.micro, trainer.micro_flag), (trainer.accumulation, trainer.accumulation_flag))
        if trainer.whole and _whole_unknown(line, trainer):
            return
    if not isinstance(micro, int) or not isinstance(passes, int) or isinstance(micro, bool):
        return
    reached = min(micro, guarded or micro)
    if reached <= 1:
        return
    new = smaller_micro_batch(micro, reached)
    more = passes * (micro // new)
    sentence = _("micro-batch {old} becomes {new}, accumulation {passes} becomes {more}: the global batch stays")
    changed = [(*flags[0], str(new))] if flags else []
    if flags and flags[1][0]:
        changed.append((*flags[1], str(more)))
    yield Smaller(
        sentence=sentence.format(old=micro, new=new, passes=passes, more=more),
        knobs=(("micro_batch", new), ("grad_accum", more)),
        flags=tuple(changed),
    )


def _whole_unknown(line: Words, trainer: Trainer) -> bool:
    """Return whether the global batch is left to follow from the micro-batch: then it would shrink with it."""
    whole = line.whole(trainer.whole)
    return whole is None or whole <= 0


def _recompute(words: Sequence[str], trainer: Trainer | None, plan: Plan) -> Iterator[Smaller]:
    sentence = _("recompute activations in the backward pass")
    if trainer is not None and trainer.recompute:
        line = Words(words, assignments=trainer.name == "torchtune")
        names, _flag, value = trainer.recompute[0]
        if (line.text(names) or "").lower() != value.lower():
            yield Smaller(sentence=sentence, knobs=(("recompute", "full"),), flags=trainer.recompute)
    elif plan.get("recompute") == "none":
        yield Smaller(sentence=sentence, knobs=(("recompute", "full"),))


def _from_file(words: Sequence[str]) -> tuple[int | None, int]:
    """Return micro-batch and accumulation of a LLaMA-Factory file, as settings after it change them."""
    path = llama_factory_file(words)
    if path is None:
        return None, 1
    text = path.read_text(encoding="utf-8", errors="replace")[:1_000_000]
    line = Words(words, assignments=True)

    def read(name: str, default: int) -> int:
        match = re.search(rf'^\s*"?{name}"?\s*:\s*(\d{{1,9}})', text, re.MULTILINE)
        return line.whole((name,)) or (int(match.group(1)) if match else default)

    return read("per_device_train_batch_size", 8), read("gradient_accumulation_steps", 1)


def _file_flags(words: Sequence[str]) -> tuple[tuple[tuple[str, ...], str], ...]:
    if llama_factory_file(words) is None:
        return ()
    names = ("per_device_train_batch_size", "gradient_accumulation_steps")
    return tuple(((name,), f"{name}=") for name in names)


def put_flags(words: Sequence[str], smaller: Smaller) -> list[str]:
    """Return the command line with the changed flags."""
    assignments = any(flag.endswith("=") for _names, flag, _value in smaller.flags)
    line = Words(words, assignments=assignments)
    for names, flag, value in smaller.flags:
        line.put(names, value, flag=flag)
    return line.words
