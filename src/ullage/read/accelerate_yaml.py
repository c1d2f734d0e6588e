"""An Accelerate configuration (YAML) → how a job is spread; needs PyYAML (``pip install 'ullage[train]'``)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ullage.errors import InputError
from ullage.i18n import _
from ullage.read.yamlfile import read_yaml

_KNOWN = frozenset(
    ("compute_environment", "debug", "distributed_type", "downcast_bf16", "dynamo_config", "enable_cpu_affinity",
     "fsdp_config", "deepspeed_config", "gpu_ids", "machine_rank", "main_training_function", "main_process_ip",
     "main_process_port", "mixed_precision", "num_machines", "num_processes", "rdzv_backend", "same_network",
     "tpu_env", "tpu_use_cluster", "tpu_use_sudo", "use_cpu", "parallelism_config", "megatron_lm_config")
)  # fmt: skip
_FSDP_KNOWN = frozenset(
    ("fsdp_sharding_strategy", "fsdp_reshard_after_forward", "fsdp_version", "fsdp_offload_params",
     "fsdp_auto_wrap_policy", "fsdp_transformer_layer_cls_to_wrap", "fsdp_activation_checkpointing",
     "fsdp_backward_prefetch", "fsdp_backward_prefetch_policy", "fsdp_forward_prefetch", "fsdp_use_orig_params",
     "fsdp_cpu_ram_efficient_loading", "fsdp_sync_module_states", "fsdp_state_dict_type", "fsdp_min_num_params")
)  # fmt: skip
_STRATEGIES: dict[str, Literal["full_shard", "shard_grad_op", "hybrid"] | None] = {
    "1": "full_shard", "full_shard": "full_shard", "2": "shard_grad_op", "shard_grad_op": "shard_grad_op",
    "3": None, "no_shard": None, "4": "hybrid", "hybrid_shard": "hybrid", "5": "hybrid", "hybrid_shard_zero2": "hybrid",
}  # fmt: skip
_PRECISIONS = {"bf16": "bfloat16", "fp16": "float16", "no": "float32", "fp8": "float8_e4m3"}


@dataclass(frozen=True, kw_only=True)
class AccelerateConfig:
    """What a configuration says.

    Attributes:
        engine: fsdp1, fsdp2, deepspeed, megatron, ddp or single.
        num_gpus: all processes, None: as many as there are.
        compute: of mixed precision, canonical name.
        fsdp: how FSDP shards.
        offload_params, recompute: of FSDP.
        deepspeed: its section, for :func:`ullage.read.deepspeed_json.parse_deepspeed`.
        context: ranks that share a sequence (context parallelism, or Ulysses under DeepSpeed).
        group: ranks of one shard group, None: all.
        compile: torch.compile.
        unknown: keys that are not understood.
    """

    engine: str
    num_gpus: int | None
    compute: str
    fsdp: Literal["full_shard", "shard_grad_op", "hybrid"] | None
    offload_params: bool
    recompute: bool
    deepspeed: dict[str, Any]
    unknown: tuple[str, ...]
    context: int = 1
    group: int | None = None
    compile: bool = False


def read_accelerate(path: Path) -> AccelerateConfig:
    """Read a configuration file.

    Raises:
        MissingExtraError: PyYAML is not installed.
        InputError: unreadable, too large, not YAML, or a value of the wrong kind.
    """
    return parse_accelerate(read_yaml(path), where=str(path))


def parse_accelerate(config: Any, *, where: str) -> AccelerateConfig:
    """Parse a configuration; unknown keys are named, not refused."""
    if not isinstance(config, dict):
        raise InputError(_("is not a mapping"), where=where)
    fsdp = _section(config, "fsdp_config", where)
    unknown = [str(key) for key in config if key not in _KNOWN]
    unknown += [f"fsdp_config.{key}" for key in fsdp if key not in _FSDP_KNOWN]
    num_gpus = config.get("num_processes")
    if num_gpus is not None and (
        isinstance(num_gpus, bool) or not isinstance(num_gpus, int) or not 1 <= num_gpus <= 1_000_000
    ):
        raise InputError(_("num_processes is no number of GPUs"), where=where, remedy=_("write a whole number"))
    _check_wrap(fsdp, where)
    context, group = _parallelism(_section(config, "parallelism_config", where), where)
    dynamo = _section(config, "dynamo_config", where).get("dynamo_backend", "no")
    precision = str(config.get("mixed_precision", "no")).lower()
    if precision not in _PRECISIONS:
        raise InputError(
            _("mixed_precision {name!r} is not known").format(name=precision[:40]),
            where=where,
            remedy=_("known are {known}").format(known=", ".join(_PRECISIONS)),
        )
    return AccelerateConfig(
        engine=_engine(str(config.get("distributed_type", "NO")).upper(), fsdp),
        num_gpus=num_gpus,
        compute=_PRECISIONS[precision],
        fsdp=_strategy(fsdp, where),
        offload_params=_true(fsdp.get("fsdp_offload_params")),
        recompute=_true(fsdp.get("fsdp_activation_checkpointing")),
        deepspeed=_section(config, "deepspeed_config", where),
        unknown=tuple(unknown),
        context=context,
        group=group,
        compile=str(dynamo).lower() not in ("no", "none", "false"),
    )


def _check_wrap(fsdp: dict[str, Any], where: str) -> None:
    """Refuse units of FSDP that are not the decoder's layers: the sizes of units decide what is gathered at once."""
    policy = str(fsdp.get("fsdp_auto_wrap_policy") or "TRANSFORMER_BASED_WRAP").upper()
    if policy != "TRANSFORMER_BASED_WRAP":
        raise InputError(
            _("{key} is not followed").format(key=f"fsdp_auto_wrap_policy {policy[:40]}"),
            where=where,
            remedy=_("write {right}").format(right="TRANSFORMER_BASED_WRAP"),
        )


def _parallelism(section: dict[str, Any], where: str) -> tuple[int, int | None]:
    """Return the ranks that share a sequence, and those of a shard group where there are several.

    Source: accelerate@1.15.0:parallelism_config.py:ParallelismConfig (FSDP shards over dp_shard x cp).
    """
    sizes = {}
    for name in ("dp_replicate_size", "dp_shard_size", "tp_size", "cp_size", "sp_size"):
        value = section.get(f"parallelism_config_{name}")
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1 << 20):
            raise InputError(_("{name} is no number of ranks").format(name=name), where=where)
        sizes[name] = value or 1
    if sizes["tp_size"] > 1:
        raise InputError(_("{key} above 1 is not followed").format(key="tp_size"), where=where)
    context = sizes["cp_size"] * sizes["sp_size"]
    return context, sizes["dp_shard_size"] * sizes["cp_size"] if sizes["dp_replicate_size"] > 1 else None


def _engine(kind: str, fsdp: dict[str, Any]) -> str:
    if kind == "FSDP":
        return "fsdp2" if str(fsdp.get("fsdp_version", 1)) == "2" else "fsdp1"
    if kind in ("DEEPSPEED", "MEGATRON_LM"):
        return {"DEEPSPEED": "deepspeed", "MEGATRON_LM": "megatron"}[kind]
    return "ddp"


def _strategy(fsdp: dict[str, Any], where: str) -> Literal["full_shard", "shard_grad_op", "hybrid"] | None:
    if not fsdp:
        return None
    if "fsdp_reshard_after_forward" in fsdp and str(fsdp.get("fsdp_version", 1)) == "2":
        return "full_shard" if _true(fsdp["fsdp_reshard_after_forward"]) else "shard_grad_op"
    name = str(fsdp.get("fsdp_sharding_strategy", "FULL_SHARD")).lower()
    if name not in _STRATEGIES:
        raise InputError(_("sharding strategy {name!r} is not known").format(name=name[:40]), where=where)
    return _STRATEGIES[name]


def _section(config: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    value = config.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InputError(_("{key} is not a mapping").format(key=key), where=where)
    return value


def _true(value: Any) -> bool:
    return value is True or str(value).lower() == "true"
