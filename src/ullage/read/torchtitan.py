"""A torchtitan configuration (TOML, as it was until 2026-02) → layout, recompute and sizes of a step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ullage.errors import InputError
from ullage.i18n import _
from ullage.spec.training import Recompute, Schedule, TrainingParallel

MAX_BYTES = 1 << 20
#: Sections that cost no memory on the device, or whose keys are read below.
_SECTIONS = frozenset(
    ("job", "profiling", "metrics", "model", "optimizer", "lr_scheduler", "training", "parallelism", "checkpoint",
     "activation_checkpoint", "float8", "experimental", "compile", "quantize", "comm", "memory_estimation",
     "validation", "fault_tolerance", "mx", "debug", "quantize")
)  # fmt: skip
_SCHEDULES: dict[str, Schedule] = {
    "1f1b": "1f1b",
    "gpipe": "gpipe",
    "interleaved1f1b": "interleaved",
    "interleavedzerobubble": "zero_bubble",
}
#: Settings that can change the memory and are not followed, with the values that change nothing.
_DOUBTS: dict[str, dict[str, tuple[Any, ...]]] = {
    "activation_checkpoint": {
        "per_op_sac_force_recompute_mm_shapes_by_fqns": ([], ["moe.router.gate"]),
        "early_stop": (False,),
        "memory_budget": (0.5,),
    },
    "compile": {"components": (["model", "loss"],)},
    "parallelism": {
        "disable_loss_parallel": (False,),
        "enable_async_tensor_parallel": (False,),
        "enable_compiled_autograd": (False,),
        "expert_parallel_comm_backend": ("standard",),
        "expert_tensor_parallel_degree": (1,),
        "module_fqns_per_model_part": (None,),
        "pipeline_parallel_expert_parallel_overlap": (False,),
        "pipeline_parallel_first_stage_less_layers": (1,),
        "pipeline_parallel_last_stage_less_layers": (1,),
        "pipeline_parallel_layers_per_stage": (),
        "pipeline_parallel_schedule_csv": ("",),
        "pipeline_parallel_split_points": ([],),
    },
    "training": {
        "dtype": ("float32",),
        "mixed_precision_param": ("bfloat16",),
        "mixed_precision_reduce": ("float32",),
    },
    "validation": {"enable": (False,), "enabled": (False,)},
}
#: The other settings of these sections: followed, or without memory of their own.
_KEYS = {
    "activation_checkpoint": "mode selective_ac_option determinism_check preserve_rng_state debug"
    " visualize_memory_budget_pareto",
    "compile": "enable backend",
    "optimizer": "name lr beta1 beta2 weight_decay eps implementation fused early_step_in_backward",
    "parallelism": "data_parallel_replicate_degree data_parallel_shard_degree fsdp_reshard_after_forward"
    " tensor_parallel_degree context_parallel_degree context_parallel_rotate_method context_parallel_load_balancer"
    " pipeline_parallel_degree pipeline_parallel_schedule expert_parallel_degree pipeline_parallel_microbatch_size",
    "training": "dataset dataset_path local_batch_size batch_size global_batch_size seq_len max_norm steps"
    " enable_cpu_offload gc_freq gc_debug seed deterministic debug_moe_force_load_balance compile warmup_steps"
    " tensor_parallel_degree data_parallel_shard_degree data_parallel_replicate_degree fsdp_reshard_after_forward"
    " dataloader",
}


@dataclass(frozen=True, kw_only=True)
class TorchtitanConfig:
    """What a configuration says; ``data_shards`` -1: all ranks that are left.

    ``flavor``: the model's size, such as ``8B``; ``schedule``: of the pipeline. ``global_batch_size`` None: one pass.
    ``pipeline_micro_batch``: sequences of one pass through a pipeline, into which a batch is cut; None: no pipeline.
    ``doubtful``: settings that can change the memory and are not followed; ``unknown``: those that are not understood.
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
    schedule: Schedule | None
    global_batch_size: int | None
    pipeline_micro_batch: int | None
    optimizer: str
    optimizer_impl: Literal["fused", "foreach", "for_loop"]
    offload: tuple[tuple[str, str], ...]
    doubtful: tuple[str, ...]
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
    _check_model(_section(config, "model", where), where)
    optimizer, impl = _optimizer(_section(config, "optimizer", where), where)
    never = layout.get("fsdp_reshard_after_forward") == "never"
    batch = _count(training, "global_batch_size", where, -1)
    local = _count(training, "local_batch_size", where, _count(training, "batch_size", where, 8))
    return TorchtitanConfig(
        flavor=str(_section(config, "model", where).get("flavor", "")),
        micro_batch_size=local,
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
            fsdp="hybrid" if replicas > 1 else "shard_grad_op" if never else "full_shard",
        ),
        data_shards=_count(layout, "data_parallel_shard_degree", where, -1),
        data_replicas=replicas,
        schedule=_schedule(layout, where),
        global_batch_size=batch if batch > 0 else None,
        pipeline_micro_batch=_pipelined(layout, local, where),
        optimizer=optimizer,
        optimizer_impl=impl,
        offload=(("params", "cpu"), ("optimizer", "cpu")) if training.get("enable_cpu_offload") is True else (),
        doubtful=tuple(_doubtful(config)),
        unknown=tuple(_unknown(config)),
    )


def _check_model(section: dict[str, Any], where: str) -> None:
    """Refuse what is no language model."""
    name = str(section.get("name", ""))
    if name.split("_")[0].split(".")[0] in ("flux", "vlm"):
        raise InputError(_("{name} is no language model").format(name=name[:40]), where=f"{where}: model.name")


def _optimizer(section: dict[str, Any], where: str) -> tuple[str, Literal["fused", "foreach", "for_loop"]]:
    """Return the optimizer and how it runs: fused AdamW where the file says nothing.

    Source: torchtitan@0.2.2:torchtitan/config/job_config.py:Optimizer.
    """
    name, impl = str(section.get("name", "AdamW")), str(section.get("implementation", "fused"))
    if section.get("fused") is False:  # before 2025-02
        impl = "foreach"
    impls: dict[str, Literal["fused", "foreach", "for_loop"]] = {
        "fused": "fused", "fused_opt_states_bf16": "fused", "foreach": "foreach", "for-loop": "for_loop",
    }  # fmt: skip
    if name not in ("AdamW", "Adam") or impl not in impls:
        raise InputError(
            _("the optimizer {name} ({impl}) is not followed").format(name=name[:40], impl=impl[:40]),
            where=f"{where}: optimizer",
            remedy=_("known are {known}").format(known="AdamW, Adam"),
        )
    return name.lower(), impls[impl]


def _schedule(layout: dict[str, Any], where: str) -> Schedule | None:
    """Return the pipeline's schedule; 1F1B where the file says nothing.

    Source: torch@2.13.0:torch/distributed/pipelining/schedules.py:get_schedule_class.
    """
    if layout.get("pipeline_parallel_degree", 1) == 1:
        return None
    name = str(layout.get("pipeline_parallel_schedule", "1F1B"))
    found = _SCHEDULES.get(name.lower())
    if found is None:
        raise InputError(
            _("the schedule {name} is not followed").format(name=name[:40]),
            where=f"{where}: pipeline_parallel_schedule",
            remedy=_("known are {known}").format(known=", ".join(_SCHEDULES)),
        )
    return found


def _pipelined(layout: dict[str, Any], local_batch: int, where: str) -> int | None:
    """Return the sequences of one pass through a pipeline: 1, or as the file says; None without a pipeline.

    Source: torchtitan@0.2.2:torchtitan/distributed/pipeline_parallel.py:build_pipeline_schedule.
    """
    if layout.get("pipeline_parallel_degree", 1) == 1:
        return None
    number = _count(layout, "pipeline_parallel_microbatches", where, -1)  # before 2025-03
    if number > 0:
        return max(1, local_batch // number)
    return min(local_batch, max(1, _count(layout, "pipeline_parallel_microbatch_size", where, 1)))


def _doubtful(config: dict[str, Any]) -> Iterator[str]:
    """Yield what can change the memory and is not followed, as ``section.key``."""
    for section, keys in _DOUBTS.items():
        values = config.get(section)
        if isinstance(values, dict):
            yield from (f"{section}.{key}" for key in keys if key in values and values[key] not in keys[key])
    model = config.get("model")
    converters = model.get("converters", ()) if isinstance(model, dict) else ()
    for one in [converters] if isinstance(converters, str) else converters:
        if not str(one).endswith("linear.float8") and one != "float8":
            yield f"model.converters: {str(one)[:40]}"


def _unknown(config: dict[str, Any]) -> Iterator[str]:
    """Yield sections that torchtitan has not, and keys of those that decide about memory."""
    for section, values in config.items():
        if section not in _SECTIONS:
            yield section
        elif section in _KEYS and isinstance(values, dict):
            known = (*_KEYS[section].split(), *_DOUBTS.get(section, ()))
            yield from (f"{section}.{key}" for key in values if key not in known)


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
