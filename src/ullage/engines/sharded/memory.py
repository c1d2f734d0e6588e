"""The card's memory under a walk: the allocator as the job sets it, and what the card leaves to it."""

from __future__ import annotations

import re
from dataclasses import replace

from ullage.account.pools import Pools
from ullage.account.timeline import Timeline
from ullage.allocator.keys import DEFAULT_VERSION
from ullage.allocator.run import check_backend
from ullage.allocator.settings import AllocatorSettings, parse_settings, parse_version
from ullage.i18n import _
from ullage.spec.training import TrainingJob
from ullage.units import MiB

#: What a context leaves of the card to the allocator is judged with this much taken.
CONTEXT_BYTES = 600 * MiB
#: The first version whose expandable segments ROCm has. Source: pytorch pull requests 177974 and 179930.
ROCM_EXPANDABLE = (2, 12)

_TORCH = re.compile(r"(?i)\b(?:py)?torch[ =@]*(\d{1,3}\.\d{1,3})")


def torch_version(job: TrainingJob) -> tuple[int, int] | None:
    """Return the version of PyTorch that the job states beside its engine's, ``None`` where it states none."""
    found = _TORCH.search(job.engine_version)
    return parse_version(found.group(1)) if found else None


def settings_of(job: TrainingJob, by_default: str = "") -> AllocatorSettings:
    """Return the allocator's settings: the job's, or what its launcher sets where it states none.

    Raises:
        InputError: PyTorch would refuse them, or they choose an allocator that is not PyTorch's own.
    """
    version = torch_version(job)
    settings = parse_settings(job.alloc_conf or by_default, version=version or DEFAULT_VERSION)
    check_backend(settings)
    if settings.expandable_segments and job.machine.gpu.vendor == "amd" and (version or (0, 0)) < ROCM_EXPANDABLE:
        return replace(settings, expandable_segments=False)
    return settings


def notes_of(job: TrainingJob) -> list[str]:
    """Say which of the job's settings do nothing."""
    if "expandable_segments:True" in job.alloc_conf and not settings_of(job).expandable_segments:
        return [_("expandable_segments does nothing on AMD GPUs before PyTorch 2.12, which the job does not state")]
    return []


def timeline_of(job: TrainingJob, by_default: str = "") -> Timeline:
    """Return an empty timeline over the card of the job."""
    settings, total = settings_of(job, by_default), job.machine.gpu.total_bytes
    fraction = settings.memory_fraction is not None
    return Timeline(
        Pools(settings, capacity_bytes=total - CONTEXT_BYTES, total_bytes=total if fraction else None),
    )
