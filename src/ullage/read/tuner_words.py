"""What the recipe files of torchtune and litgpt share: what they say of a job, laid over the flags."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ullage.errors import InputError
from ullage.frozen import Frozen
from ullage.i18n import _
from ullage.read.recipe_fields import Fields
from ullage.spec.training import Lora, Precision, Recompute, TrainingJob

_BF16 = Precision(moments="bfloat16")


class TunerWords(Frozen):
    """What a recipe says; None where it leaves a thing to the command line.

    Attributes:
        seq_len: None: the samples' own, which the file does not tell.
        offload, said: as on the job.
    """

    model: str | None
    micro_batch_size: int
    grad_accum: int
    seq_len: int | None
    optimizer: str
    optimizer_impl: str | None = None
    recompute: Recompute = Recompute(given=False)
    compile: bool = False
    loss: str | None = None
    lora: Lora | None = None
    method: str = "full"
    base_quantization: str | None = None
    offload: tuple[tuple[str, str], ...] = ()
    said: tuple[str, ...] = ()


def lay_over(job: TrainingJob, words: TunerWords) -> TrainingJob:
    """Return the job with what the recipe says; both train all in bf16."""
    stated = (
        "micro_batch_size", "grad_accum", "optimizer", "optimizer_impl", "recompute", "compile", "loss", "lora",
        "method", "base_quantization", "offload",
    )  # fmt: skip
    values: dict[str, Any] = {name: getattr(words, name) for name in stated}
    said = list(words.said)
    if words.seq_len is None:
        said.append(_("sequences of {count} tokens: the file does not limit them").format(count=job.seq_len))
    return replace(job, **values, precision=_BF16, seq_len=words.seq_len or job.seq_len, assumed=(*job.assumed, *said))


def adapters(fields: Fields, *, rank: str, dropout: str, targets: Sequence[str], dora: bool = False) -> Lora:
    """Return the pairs beside a frozen base.

    Raises:
        InputError: no rank, or nothing that gets them.
    """
    found, share = fields.count(rank), fields.fraction(dropout)
    if found is None or not targets:
        raise InputError(_("the adapters have no rank or no targets"), where=fields.where)
    return Lora(rank=found, targets=tuple(targets), dropout=share, dora=dora, dtype="bfloat16")


def unfollowed(fields: Fields, keys: dict[str, str]) -> None:
    """Refuse keys that ask for what the rules do not count: ``keys`` says what.

    Raises:
        InputError: the first of them that the file has.
    """
    for key, what in keys.items():
        if fields.raw(key):
            raise InputError(_("{key} asks for {what}").format(key=key, what=what), where=fields.where)


def named_differently(fields: Fields, harmless: frozenset[str], prefixes: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Return the sentence about settings that nobody knows, if there are any."""
    strange = fields.not_asked(harmless, prefixes)
    if not strange:
        return ()
    return (_("keys not known, taken as without memory: {keys}").format(keys=", ".join(strange)[:400]),)
