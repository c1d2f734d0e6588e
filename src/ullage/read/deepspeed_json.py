"""A DeepSpeed configuration (JSON) → settings of ZeRO and of the step; ``"auto"`` is left to the Trainer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ullage.account.zero import ZeroSettings
from ullage.errors import InputError
from ullage.i18n import _
from ullage.read.jsonfile import read_json_object

#: Keys that cost no memory on the device.
HARMLESS = frozenset(
    ("scheduler", "steps_per_print", "wall_clock_breakdown", "dump_state", "tensorboard", "wandb", "csv_monitor",
     "comms_logger", "flops_profiler", "prescale_gradients", "gradient_predivide_factor", "communication_data_type",
     "comms_config", "seq_parallel_communication_data_type", "sparse_gradients",
     "gradient_allreduce_bucket", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "seed", "checkpoint",
     "gradient_clipping", "data_types", "memory_breakdown", "disable_allgather", "elasticity", "autotuning", "aio",
     "train_batch_size", "compile", "monitor_config", "communication_data_type", "hybrid_engine", "data_efficiency",
     "activation_checkpointing", "torch_autocast", "amp", "sequence_parallel_size", "load_universal_checkpoint")
)  # fmt: skip
_TOP = frozenset(
    ("zero_optimization", "fp16", "bf16", "bfloat16", "optimizer", "train_micro_batch_size_per_gpu",
     "gradient_accumulation_steps", "tensor_parallel", "pipeline")
)  # fmt: skip
#: key in zero_optimization -> (field of ZeroSettings, type).
_ZERO_KEYS: dict[str, tuple[str, type]] = {
    "stage": ("stage", int),
    "reduce_bucket_size": ("reduce_bucket", int),
    "allgather_bucket_size": ("allgather_bucket", int),
    "stage3_prefetch_bucket_size": ("prefetch_bucket", int),
    "stage3_param_persistence_threshold": ("persistence_threshold", int),
    "stage3_max_live_parameters": ("max_live", int),
    "stage3_max_reuse_distance": ("max_reuse_distance", int),
    "sub_group_size": ("sub_group", int),
    "overlap_comm": ("overlap_comm", bool),
    "contiguous_gradients": ("contiguous_gradients", bool),
    "zero_hpz_partition_size": ("hpz_partition_size", int),
    "zero_quantized_weights": ("quantized_weights", bool),
    "zero_quantized_gradients": ("quantized_gradients", bool),
}
#: More elements than any machine holds; "unlimited" is written so.
MAX_COUNT = 10**18
_ZERO_HARMLESS = frozenset(
    (
        "allgather_partitions",
        "reduce_scatter",
        "round_robin_gradients",
        "load_from_fp32_weights",
        "elastic_checkpoint",
        "stage3_gather_16bit_weights_on_model_save",
        "stage3_gather_fp16_weights_on_model_save",
        "ignore_unused_parameters",
        "legacy_stage1",
        "mics_shard_size",
        "memory_efficient_linear",
        "use_multi_rank_bucket_allreduce",
        "stage3_module_granularity_threshold",
        "pipeline_loading_checkpoint",
        "override_module_apply",
        "stage3_model_persistence_threshold",
        "log_trace_cache_warnings",
        "offload_optimizer",
        "offload_param",
        "cpu_offload",
        "cpu_offload_params",
        "cpu_offload_param",
        "zeropp_loco_param",
        "zero_quantized_nontrainable_weights",
        "gather_16bit_weights_on_model_save",
        "module_granularity_threshold",
        "model_persistence_threshold",
        "use_all_reduce_for_fetch_params",
        "stage3_use_all_reduce_for_fetch_params",
        "cpu_offload_use_pin_memory",
        "mics_hierarchical_params_gather",
    )
)
#: Names that stage 3's settings have without their prefix.
#: Source: deepspeed@0.17.0:runtime/zero/config.py:DeepSpeedZeroConfig (fields with an alias), runtime/config_utils.py:
#: DeepSpeedConfigModel (populate_by_name).
_SHORT = {
    key.removeprefix("stage3_"): key
    for key in (
        "stage3_prefetch_bucket_size",
        "stage3_param_persistence_threshold",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
    )
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DeepspeedConfig:
    """What a configuration says.

    Attributes:
        zero: the settings of ZeRO, defaults where nothing is said.
        compute: float16, bfloat16 or float32.
        optimizer: its name in lower case, or None.
        micro_batch_size, grad_accum: or None where they are "auto" or not given.
        auto: keys that are "auto", to be filled from the Trainer's arguments.
        unknown: keys that are not understood.
    """

    zero: ZeroSettings
    compute: str
    optimizer: str | None
    micro_batch_size: int | None
    grad_accum: int | None
    auto: tuple[str, ...]
    unknown: tuple[str, ...]


def read_deepspeed(path: Path) -> DeepspeedConfig:
    """Read a configuration file.

    Raises:
        InputError: not JSON, or a value of the wrong kind.
    """
    return parse_deepspeed(read_json_object(path), where=str(path))


def parse_deepspeed(config: dict[str, Any], *, where: str) -> DeepspeedConfig:
    """Parse a configuration; unknown keys are named, not refused."""
    section = {_SHORT.get(key, key): value for key, value in _section(config, "zero_optimization", where).items()}
    auto = [key for key, value in config.items() if value == "auto"]
    auto += [f"zero_optimization.{key}" for key, value in section.items() if value == "auto"]
    unknown = [key for key in config if key not in _TOP and key not in HARMLESS and not key.startswith("_")]
    unknown += [f"zero_optimization.{key}" for key in section if key not in _ZERO_KEYS and key not in _ZERO_HARMLESS]
    optimizer = _section(config, "optimizer", where).get("type")
    return DeepspeedConfig(
        zero=_zero(section, where),
        compute=_compute(config, where),
        optimizer=optimizer.lower() if isinstance(optimizer, str) else None,
        micro_batch_size=_count(config, "train_micro_batch_size_per_gpu", where),
        grad_accum=_count(config, "gradient_accumulation_steps", where),
        auto=tuple(auto),
        unknown=tuple(unknown),
    )


def refuse_deepspeed(config: dict[str, Any], *, where: str) -> None:
    """Refuse settings that change the memory in ways that no rule here follows.

    Source: deepspeed@0.17.0:module_inject/layers.py (autotp_size), runtime/zero/mics.py (mics_shard_size), runtime/
        config.py (grad_accum_dtype, graph_harvesting), runtime/hybrid_engine.py, compile/ (deepcompile); 0.18's
        runtime/precision_config.py (states in the format of the parameters).

    Raises:
        InputError: one of them is on.
    """
    zero = _section(config, "zero_optimization", where)
    found = {
        "tensor_parallel: autotp_size above 1": _above_one(_section(config, "tensor_parallel", where), "autotp_size"),
        "zero_optimization: mics_shard_size": _above_one(zero, "mics_shard_size"),
        "zero_optimization: zero_quantized_nontrainable_weights": zero.get("zero_quantized_nontrainable_weights")
        is True,
        "data_types: grad_accum_dtype": _section(config, "data_types", where).get("grad_accum_dtype") is not None,
        "sequence_parallel_size above 1": _above_one(config, "sequence_parallel_size"),
        "hybrid_engine": _section(config, "hybrid_engine", where).get("enabled") is True,
        "amp": _section(config, "amp", where).get("enabled") is True,
        "torch_autocast": _section(config, "torch_autocast", where).get("enabled") is True,
        "compile: deepcompile": _section(config, "compile", where).get("deepcompile") is True,
    }
    narrow = ("master_weights_and_grads", "optimizer_states")
    for key in ("bf16", "bfloat16", "fp16"):
        for name, value in _section(config, key, where).items():
            found[f"{key}: {name}"] = value is True and name.endswith(narrow)
    for name, stated in found.items():
        if stated:
            raise InputError(_("{key} is not followed").format(key=name), where=where)


def _above_one(section: dict[str, Any], key: str) -> bool:
    value = section.get(key)
    return isinstance(value, int) and not isinstance(value, bool) and value > 1


def _zero(section: dict[str, Any], where: str) -> ZeroSettings:
    found: dict[str, Any] = {}
    for key, (name, kind) in _ZERO_KEYS.items():
        value = section.get(key)
        if value is None or value == "auto":
            continue
        if kind is bool and not isinstance(value, bool):
            raise _wrong(f"zero_optimization.{key}", _("true or false"), where)
        found[name] = value if kind is bool else _whole(value, f"zero_optimization.{key}", where)
    if not 0 <= found.get("stage", 0) <= 3:
        raise _wrong("zero_optimization.stage", _("0, 1, 2 or 3"), where)
    for key, old, name in (
        ("offload_optimizer", "cpu_offload", "offload_optimizer"),
        ("offload_param", "cpu_offload_params", "offload_params"),
    ):
        device = _section(section, key, where).get("device")
        if section.get(old) is True or section.get(old.removesuffix("s")) is True:
            device = "cpu"
        if isinstance(device, str) and device not in ("none", "auto"):
            found[name] = device
    return ZeroSettings(**found)


def _compute(config: dict[str, Any], where: str) -> str:
    for keys, dtype in ((("bf16", "bfloat16"), "bfloat16"), (("fp16",), "float16")):
        for key in keys:
            if _section(config, key, where).get("enabled") is True:
                return dtype
    return "float32"


def _section(config: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    value = config.get(key)
    if value is None or value == "auto":
        return {}
    if not isinstance(value, dict):
        raise _wrong(key, _("an object"), where)
    return value


def _whole(value: Any, key: str, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= MAX_COUNT or value % 1:
        raise _wrong(key, _("a whole number"), where)
    return int(value)


def _count(config: dict[str, Any], key: str, where: str) -> int | None:
    value = config.get(key)
    return None if value is None or value == "auto" else _whole(value, key, where)


def _wrong(key: str, right: str, where: str) -> InputError:
    return InputError(_("{key} has a value that it cannot have").format(key=key), where=where, remedy=right)
