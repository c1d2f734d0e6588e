"""PyTorch's private names that tracing relies on: one that is missing is named before anything runs."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from ullage.errors import InputError
from ullage.i18n import _

#: The version whose names these are.
TESTED = "2.13"
_FSDP = "torch.distributed.fsdp._fully_shard"
#: (module, names in it) of every trace.
ALWAYS = (
    ("torch._C", ("_current_graph_task_id", "_current_autograd_node", "_storage_Use_Count")),
    ("torch._C._autograd", ("_get_sequence_nr",)),
    ("torch", ("Tensor._use_count", "UntypedStorage._cdata", "clear_autocast_cache")),
    ("torch.autograd", ("_engine_run_backward",)),
    ("torch.utils._python_dispatch", ("TorchDispatchMode",)),
    ("torch.utils._pytree", ("tree_map", "tree_leaves")),
    ("torch.utils.checkpoint", ("_infer_device_type",)),
    (
        "torch.utils._foreach_utils",
        ("_get_foreach_kernels_supported_devices", "_get_fused_kernels_supported_devices"),
    ),
)  # fmt: skip
#: Of a trace of one rank of many.
RANKS = (
    ("torch.testing._internal.distributed.fake_pg", ("FakeStore",)),
    ("torch.utils._python_dispatch", ("_disable_current_modes",)),
    ("torch.distributed", ("Reducer._rebuild_buckets", "Logger.set_runtime_stats_and_log")),
    ("torch.distributed.tensor", ("DTensor",)),
    ("torch.distributed.tensor._sharding_prop", ("ShardingPropagator._propagate_tensor_meta_non_cached",)),
    ("torch.distributed._functional_collectives", ("AsyncCollectiveTensor",)),
    (
        f"{_FSDP}._fsdp_param_group",
        ("FSDPParamGroup._validate_no_meta_params", "foreach_reduce", "foreach_all_gather_copy_out"),
    ),
    (f"{_FSDP}._fsdp_param", ("FSDPParam.init_unsharded_param",)),
)


def check_names(wanted: tuple[tuple[str, tuple[str, ...]], ...]) -> None:
    """Refuse a PyTorch that lacks a name.

    Raises:
        InputError: so.
    """
    for module, names in wanted:
        for name in names:
            if not _is_there(module, name):
                raise InputError(
                    _("PyTorch {version} has no {name}, which tracing relies on").format(
                        version=import_module("torch").__version__, name=f"{module}.{name}"
                    ),
                    remedy=_("tracing is tested with PyTorch {version}").format(version=TESTED),
                )


def _is_there(module: str, name: str) -> bool:
    try:
        found: Any = import_module(module)
    except ImportError:
        return False
    for part in name.split("."):
        if not hasattr(found, part):
            return False
        found = getattr(found, part)
    return True
