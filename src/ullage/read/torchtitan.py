"""A torchtitan configuration (TOML, as it was until 2026-02) → layout, recompute and sizes of a step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ullage.errors import InputError
from ullage.i18n import _
from ullage.spec.training import Recompute, TrainingParallel

MAX_BYTES = 1 << 20
#: Sections that cost no memory on the device, or whose keys are read below.
_SECTIONS = frozenset(
    ("job", "profiling", "metrics", "model", "optimizer", "lr_scheduler", "training", "parallelism", "checkpoint",
     "activation_checkpoint", "float8", "experimental", "compile", "quantize", "comm", "memory_estimation",
     "validation", "fault_tolerance", "mx", "debug")
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TorchtitanConfig:
    """What a configuration says; ``data_shards`` -1: all ranks that are left.

    ``flavor``: the model's size, such as ``8B``. ``unknown``: sections that are not understood.
    """

    flavor: str
    micro_batch_size: int
    seq_len: int
    compile: bool
    float8: bool
    recompute: Recompute
    parallel: TrainingParallel
    data_shards: int
    data_replicas: int
    unknown: tuple[str, ...]


def read_torchtitan(path: Path) -> TorchtitanConfig:
    """Read a configuration file.

    Raises:
        InputError: unreadable, too large, not TOML, or a value of the wrong kind.
    """
    try:
        import tomllib
    except ModuleNotFoundError:
        raise InputError(_("reading TOML needs Python 3.11 or later"), where=str(path)) from None
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(_("cannot be read ({reason})").format(reason=error.strerror), where=str(path)) from None
    if len(data) > MAX_BYTES:
        raise InputError(_("the file has {size:,} bytes").format(size=len(data)), where=str(path))
    try:
        config = tomllib.loads(data.decode("utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise InputError(_("is not TOML ({reason})").format(reason=str(error)[:80]), where=str(path)) from None
    return parse_torchtitan(config, where=str(path))


def parse_torchtitan(config: dict[str, Any], *, where: str) -> TorchtitanConfig:
    """Parse a configuration; unknown sections are named, not refused."""
    training, layout = _section(config, "training", where), _section(config, "parallelism", where)
    layout = {**training, **_section(config, "experimental", where), **layout}  # older files keep degrees elsewhere
    sizes = {
        key: _count(layout, f"{key}_parallel_degree", where, 1) for key in ("tensor", "context", "pipeline", "expert")
    }
    replicas = _count(layout, "data_parallel_replicate_degree", where, 1)
    return TorchtitanConfig(
        flavor=str(_section(config, "model", where).get("flavor", "")),
        micro_batch_size=_count(training, "local_batch_size", where, _count(training, "batch_size", where, 8)),
        seq_len=_count(training, "seq_len", where, 2048),
        compile=training.get("compile") is True or _section(config, "compile", where).get("enable") is True,
        float8=_section(config, "float8", where).get("enable_float8_linear") is True
        or any("float8" in str(one) for one in _section(config, "model", where).get("converters", ())),
        recompute=_recompute(_section(config, "activation_checkpoint", where), where),
        parallel=TrainingParallel(
            tensor_parallel_size=sizes["tensor"],
            sequence_parallel=sizes["tensor"] > 1,
            context_parallel_size=sizes["context"],
            pipeline_parallel_size=sizes["pipeline"],
            expert_parallel_size=sizes["expert"],
            fsdp="hybrid" if replicas > 1 else "full_shard",
        ),
        data_shards=_count(layout, "data_parallel_shard_degree", where, -1),
        data_replicas=replicas,
        unknown=tuple(key for key in config if key not in _SECTIONS),
    )


def _recompute(section: dict[str, Any], where: str) -> Recompute:
    mode, option = section.get("mode", "selective"), str(section.get("selective_ac_option", "2"))
    if mode == "full":
        return Recompute(kind="full")
    if mode == "none":
        return Recompute(kind="none")
    if mode != "selective":
        raise InputError(
            _("activation_checkpoint.mode {mode!r} is not known").format(mode=str(mode)[:40]),
            where=where,
            remedy=_("write none, selective or full"),
        )
    return (
        Recompute(kind="selective")
        if option == "op"
        else Recompute(kind="full", every=int(option) if option.isdigit() else 2)
    )


def _section(config: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    value = config.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InputError(_("{key} is not a section").format(key=key), where=where)
    return value


def _count(section: dict[str, Any], key: str, where: str, default: int) -> int:
    value = section.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not -1 <= value <= 1 << 32 or value == 0:
        raise InputError(_("{key} is no count").format(key=key), where=where, remedy=_("write a whole number"))
    return value
