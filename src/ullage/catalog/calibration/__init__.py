"""Calibration profiles: what ``ullage calibrate`` measured, found again for the GPU of a job.

Profiles of the user's (``~/.config/ullage/calibration``, or under ``XDG_CONFIG_HOME``) come before those that are
shipped in this folder; of several for one kind of GPU the newest counts. ``ULLAGE_CALIBRATION=off`` switches them off,
any other value is the name or the path of the one to take. On the path of every fit: without a profile this must cost
nothing to speak of.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ullage.errors import InputError
from ullage.files import set_aside
from ullage.i18n import _
from ullage.spec.machine import Calibration, Figure, Gpu

if TYPE_CHECKING:
    from ullage.spec.serving import ServingJob
    from ullage.spec.training import TrainingJob

    Job = TypeVar("Job", bound=ServingJob | TrainingJob)

VARIABLE = "ULLAGE_CALIBRATION"
FORMAT = 1
SHIPPED = Path(__file__).parent
#: A profile counts for a card whose total differs by no more: drivers and ECC settings move it.
TOTAL_SHARE = 0.02
MAX_PROFILE_BYTES = 4 * 2**20
MAX_FIGURE_BYTES = 2**50


def user_folder() -> Path:
    """Return where the user's profiles lie; the folder may not exist."""
    home = os.environ.get("XDG_CONFIG_HOME")
    return (Path(home) if home else Path("~/.config").expanduser()) / "ullage" / "calibration"


def with_calibration(job: Job) -> Job:
    """Return the job with its GPU's calibration laid on, and a sentence of it in ``assumed``; else the job itself.

    Raises:
        InputError: ``ULLAGE_CALIBRATION`` names a profile that cannot be used.
    """
    chosen = os.environ.get(VARIABLE, "")
    gpu = job.machine.gpu
    if chosen.lower() in ("off", "0", "none") or gpu.calibration is not None:
        return job
    found, said = find(gpu, chosen)
    if found is None and not said:
        return job
    if found is not None:
        job = replace(job, machine=replace(job.machine, gpu=replace(gpu, calibration=found)))
        said.append(
            _("context, workspaces and NCCL as calibration {name} measured them ({date}, {software})").format(
                name=found.name, date=found.measured[:10], software=found.software
            )
        )
    return replace(job, assumed=(*job.assumed, *said))


def find(gpu: Gpu, chosen: str = "") -> tuple[Calibration | None, list[str]]:
    """Return the profile for a kind of GPU, and sentences on files that could not be used."""
    if chosen:
        return _chosen(chosen, gpu), []
    warnings: list[str] = []
    for folder in (user_folder(), SHIPPED):
        matching = [profile for profile in _profiles(folder, warnings) if _is_of(profile, gpu)]
        if matching:
            return calibration_of(max(matching, key=lambda profile: str(profile["measured"]))), warnings
    return None, warnings


def _profiles(folder: Path, warnings: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the profiles of a folder; one that is corrupt is moved aside and said, the fit goes on without it."""
    try:
        names = sorted(name for name in os.listdir(folder) if name.endswith(".json"))  # noqa: PTH208
    except OSError:
        return
    for name in names:
        path = folder / name
        try:
            yield read_profile(path)
        except InputError as error:
            kept = set_aside(path) if folder != SHIPPED else None
            where = _("; kept as {name}").format(name=kept.name) if kept else ""
            warnings.append(_("calibration not used: {error}{where}").format(error=error, where=where))


def _chosen(chosen: str, gpu: Gpu) -> Calibration:
    """Return the profile that the environment names."""
    path = Path(chosen) if chosen.endswith(".json") else user_folder() / f"{chosen}.json"
    profile = read_profile(path)
    if not _is_of(profile, gpu):
        raise InputError(
            _("the calibration is of {there}, the job's GPU is {asked}").format(
                there=profile["gpu"]["name"], asked=gpu.name
            ),
            where=VARIABLE,
            remedy=_("unset it, or set it to off"),
        )
    return calibration_of(profile)


def _is_of(profile: dict[str, Any], gpu: Gpu) -> bool:
    there = profile["gpu"]
    return bool(there["name"] == gpu.name and abs(there["total_bytes"] / gpu.total_bytes - 1) <= TOTAL_SHARE)


def read_profile(path: Path) -> dict[str, Any]:
    """Read and check a profile.

    Raises:
        InputError: there is none, or it is corrupt.
    """
    import json

    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_PROFILE_BYTES + 1)
        profile: dict[str, Any] = json.loads(text) if len(text) <= MAX_PROFILE_BYTES else {}
    except OSError as error:
        raise InputError(_("cannot be read ({reason})").format(reason=error.strerror), where=str(path)) from None
    except (ValueError, RecursionError):
        profile = {}
    wrong = _what_is_wrong(profile)
    if wrong:
        raise InputError(_("is no calibration profile: {wrong}").format(wrong=wrong), where=str(path))
    return profile


def _what_is_wrong(profile: Any) -> str:
    """Return what makes a profile unusable, empty when nothing does."""
    if not isinstance(profile, dict):
        return _("not a JSON object")
    if profile.get("ullage_calibration") != FORMAT:
        return _("not of format {number}").format(number=FORMAT)
    gpu, figures = profile.get("gpu"), profile.get("figures")
    if not isinstance(gpu, dict) or not isinstance(gpu.get("name"), str) or not _is_size(gpu.get("total_bytes"), 1):
        return _("no GPU")
    texts = (profile.get("name"), profile.get("measured"))
    if not all(isinstance(text, str) and text for text in texts) or not isinstance(profile.get("software"), dict):
        return _("no name, date or software")
    if not isinstance(figures, dict):
        return _("no figures")
    for name, figure in figures.items():
        values: list[Any] = [figure.get(key) for key in ("low", "value", "high")] if isinstance(figure, dict) else [""]
        if not all(_is_number(value) for value in values) or sorted(values) != values:
            return _("the figure {name} is not low <= value <= high").format(name=str(name)[:60])
    return ""


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e21


def _is_size(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < MAX_FIGURE_BYTES


def calibration_of(profile: dict[str, Any]) -> Calibration:
    """Return the amounts in bytes of a checked profile; rates are left to those who read the profile itself."""
    software = profile["software"]
    said = [f"{key} {software[key]}" for key in ("driver", "cuda", "torch") if software.get(key)]
    return Calibration(
        name=profile["name"],
        measured=profile["measured"],
        software=", ".join(said),
        num_ranks=profile.get("nccl_ranks") or 1,
        figures=tuple(
            Figure(name=name, value=int(figure["value"]), low=int(figure["low"]), high=int(figure["high"]))
            for name, figure in profile["figures"].items()
            if figure.get("unit") == "bytes"
        ),
    )
