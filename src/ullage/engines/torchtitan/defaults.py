"""What torchtitan does by itself, by date: it is used from its main branch more than from releases."""

from __future__ import annotations

import re
from dataclasses import dataclass

#: Dates (as ``YYYY-MM-DD``) from which the rules are known.
VERSIONS = (
    "2024-12-26", "2025-03-19", "2025-04-02", "2025-07-28", "2025-10-09",
    "2025-12-01", "2026-01-27", "2026-04-27", "2026-06-24",
)  # fmt: skip
#: Commits that published runs name, and their dates.
COMMITS = {"9dec370": "2024-12-26", "e7c0cae": "2025-06-13", "820504e": "2025-06-14", "b5bcd76": "2026-08-21"}
#: Releases and their dates (torchtitan's tags).
RELEASES = {"0.1.0": "2025-07-02", "0.2.0": "2025-10-10", "0.2.1": "2025-12-26", "0.2.2": "2026-02-20"}
#: What a job without a version is taken to run, as with every other framework: the newest release.
NEWEST_RELEASE = "0.2.2"
_DATE = re.compile(r"20\d\d-\d\d(?:-\d\d)?")


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How a version runs a step.

    Attributes:
        date: of the version.
        fused_norm: nn.RMSNorm in one kernel. Source: torchtitan@3b39d7a (2025-03-19).
        loss_compiled: the loss function is compiled with the model. Source: torchtitan@bbb1b61 (2025-04-02).
        split_root: embedding, and norm with head, are units of their own; before, one unit of the root held both, and
            the last block stayed gathered after forward. Source: torchtitan@83e6941 (2025-07-28).
        cudnn_first: cuDNN's attention is asked for first on every NVIDIA GPU, not only from Blackwell on.
            Source: torchtitan@6a3a9da (2025-10-09):torchtitan/models/attention.py:ScaledDotProductAttentionWrapper.
        saves_cudnn: op-wise checkpointing keeps cuDNN attention's output. Source: torchtitan@b39377f (2025-12-01).
        chunked_loss: head and loss in 8 chunks of the sequence, if the configuration asks for nothing else.
            Source: torchtitan@786e26f (2026-04-27):torchtitan/components/loss.py:ChunkedCELoss.
        gathers_in_place: the parts of one sequence are gathered where they belong; before, they were copied there.
            Source: pytorch#169404 (2025-12): torch/_utils.py:_maybe_view_chunk_cat.
        repeats_kv: keys and values are copied for every query head. Source: torchtitan@ff0829c (2026-01-27).
        fused_qkv: one projection for q, k and v. Source: torchtitan@3396a4b (2026-06-24).
    """

    date: str
    fused_norm: bool
    loss_compiled: bool
    split_root: bool
    cudnn_first: bool
    saves_cudnn: bool
    chunked_loss: bool
    gathers_in_place: bool
    repeats_kv: bool
    fused_qkv: bool


def date_of(version: str) -> str | None:
    """Return the date of a version as users write it, or None when it cannot be told."""
    for commit, date in COMMITS.items():
        if commit in version:
            return date
    for release, date in RELEASES.items():
        if re.search(rf"(?<![\d.]){re.escape(release)}(?![\d.])", version):
            return date
    found = _DATE.search(version)
    if found is None:
        return None
    text = found.group()
    return text if len(text) == 10 else f"{text}-15"


def rules_at(date: str) -> Rules:
    """Return the rules of a date."""
    return Rules(
        date=date,
        fused_norm=date >= "2025-03-19",
        loss_compiled=date >= "2025-04-02",
        split_root=date >= "2025-07-28",
        cudnn_first=date >= "2025-10-09",
        saves_cudnn=date >= "2025-12-01",
        chunked_loss=date >= "2026-04-27",
        gathers_in_place=date >= "2025-12-15",
        repeats_kv=date < "2026-01-27",
        fused_qkv=date >= "2026-06-24",
    )
