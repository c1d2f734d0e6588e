"""What happens above autograd on a GPU and not on meta tensors: the choice of an attention kernel, and autocast."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from ullage.trace.cuda.attention import attention
from ullage.trace.cuda.norms import rms_norm
from ullage.trace.recorder.temporaries import Kernels

CUDA_NAMES = ("cuda",)
#: Functions that autocast runs in the lower precision, as Python names them.
#: Source: torch@2.13.0:aten/src/ATen/autocast_mode.h (AT_FORALL_LOWER_PRECISION_FP).
LOWER = frozenset(
    [
        "conv1d",
        "conv2d",
        "conv3d",
        "conv_tbc",
        "conv_transpose1d",
        "conv_transpose2d",
        "conv_transpose3d",
        "convolution",
        "prelu",
        "addmm",
        "addmv",
        "addr",
        "matmul",
        "__matmul__",
        "__rmatmul__",
        "einsum",
        "mm",
        "mv",
        "linalg_vecdot",
        "linalg_multi_dot",
        "linear",
        "addbmm",
        "baddbmm",
        "bmm",
        "chain_matmul",
        "scaled_dot_product_attention",
        "gru_cell",
        "lstm_cell",
        "rnn_tanh_cell",
        "rnn_relu_cell",
        "multi_head_attention_forward",
    ]
)
#: Functions that autocast runs in fp32. Source: as above (AT_FORALL_FP32, AT_FORALL_FP32_SET_OPT_DTYPE).
FULL = frozenset(
    [
        "acos",
        "asin",
        "cosh",
        "erfinv",
        "exp",
        "expm1",
        "log",
        "log10",
        "log2",
        "log1p",
        "reciprocal",
        "rsqrt",
        "__rpow__",
        "sinh",
        "tan",
        "pow",
        "softplus",
        "layer_norm",
        "native_layer_norm",
        "group_norm",
        "frobenius_norm",
        "nuclear_norm",
        "cosine_similarity",
        "poisson_nll_loss",
        "cosine_embedding_loss",
        "nll_loss",
        "nll_loss2d",
        "hinge_embedding_loss",
        "kl_div",
        "l1_loss",
        "smooth_l1_loss",
        "huber_loss",
        "mse_loss",
        "margin_ranking_loss",
        "multilabel_margin_loss",
        "soft_margin_loss",
        "triplet_margin_loss",
        "multi_margin_loss",
        "binary_cross_entropy_with_logits",
        "cross_entropy",
        "cross_entropy_loss",
        "dist",
        "pdist",
        "cdist",
        "renorm",
        "logsumexp",
        "prod",
        "softmax",
        "log_softmax",
        "cumprod",
        "cumsum",
        "sum",
        "norm",
        "rms_norm",
        "__pow__",
    ]
)
#: Functions that autocast runs in the widest type of their inputs. Source: as above (AT_FORALL_PROMOTE).
WIDEST = frozenset(
    ["addcdiv", "addcmul", "atan2", "bilinear", "cross", "dot", "grid_sample", "index_put", "tensordot", "scatter_add"]
)
#: Parts of FULL that only widen where no dtype is given.
_WITH_DTYPE = frozenset(["prod", "softmax", "log_softmax", "cumprod", "cumsum", "sum"])
#: The kernel's own name for it, before anything stands in for it.
_ATTENTION = functional.scaled_dot_product_attention
_RMS_NORMS = (functional.rms_norm, torch.rms_norm)


class CudaFunctions(TorchFunctionMode):
    """Redirect ``device="cuda"`` to meta, run attention as on a GPU, and cast as ``torch.autocast("cuda")`` does."""

    def __init__(self, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels
        self._casts: dict[int, tuple[Any, Any]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one function of PyTorch's Python interface."""
        kwargs = kwargs or {}
        if func is not torch.device and _names_cuda(args, kwargs):
            args, kwargs = tree_map(_redirect, args), tree_map(_redirect, kwargs)
        if torch.is_autocast_enabled("cuda"):
            args, kwargs = self._cast(getattr(func, "__name__", ""), args, kwargs)
        if func is _ATTENTION:
            return self.attend(*args, **kwargs)
        if func is functional.dropout:
            return dropout(*args, **kwargs)
        if func in _RMS_NORMS:
            return rms_norm(func, *args, **kwargs)
        if func is torch.Tensor.cuda:
            return args[0].to("meta")
        return func(*args, **kwargs)

    def attend(self, *args: Any, **kwargs: Any) -> Any:
        """Run attention as on a GPU; on host tensors as ever. Called by its own name, no mode has cast the inputs."""
        if torch.is_autocast_enabled("cuda"):
            args, kwargs = self._cast("scaled_dot_product_attention", args, kwargs)
        query = args[0] if args else kwargs["query"]
        if query.device.type == "meta":
            return attention(self.kernels, _ATTENTION, *args, **kwargs)
        return _ATTENTION(*args, **kwargs)

    def _cast(self, name: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
        if name in LOWER:
            dtype = torch.get_autocast_dtype("cuda")
        elif name in FULL and not (name in _WITH_DTYPE and kwargs.get("dtype") is not None):
            dtype = torch.float32
        elif name in WIDEST:
            floats = [each.dtype for each in args if isinstance(each, torch.Tensor) and each.dtype.is_floating_point]
            dtype = torch.float32 if torch.float32 in floats else (floats[0] if floats else torch.float32)
        else:
            return args, kwargs
        return (
            tree_map(lambda each: self._cached(each, dtype), args),
            tree_map(lambda each: self._cached(each, dtype), kwargs),
        )

    def _cached(self, value: Any, dtype: Any) -> Any:
        """Cast a tensor; the cast of a leaf that is trained is kept until the outermost autocast is left.

        Source: torch@2.13.0:aten/src/ATen/autocast_mode.cpp:cached_cast.
        """
        if not isinstance(value, torch.Tensor) or value.device.type != "meta":
            return value
        if not value.dtype.is_floating_point or value.dtype in (dtype, torch.float64):
            return value
        lowers = dtype == torch.get_autocast_dtype("cuda") and value.dtype == torch.float32
        keeps = lowers and value.requires_grad and value.is_leaf and not value._is_view()
        if not keeps or not torch.is_autocast_cache_enabled():
            return value.to(dtype)
        found = self._casts.get(id(value))
        if found is not None and found[0]() is value:
            return found[1]
        cast = value.to(dtype)
        self._casts[id(value)] = (weakref.ref(value), cast)
        return cast

    def clear(self) -> None:
        """Forget the casts: the outermost autocast was left."""
        self._casts.clear()


def dropout(hidden: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    """Drop out as one kernel, which keeps a mask of one byte per element; elsewhere PyTorch keeps the scaled noise.

    Source: torch@2.13.0:aten/src/ATen/native/Dropout.cpp:is_fused_kernel_acceptable, dropout.
    """
    if training and not inplace and 0 < p < 1 and hidden.device.type == "meta" and hidden.numel():
        return torch.native_dropout(hidden, p, True)[0]
    return functional.dropout(hidden, p, training, inplace)


def _is_cuda(value: Any) -> bool:
    if isinstance(value, str):
        return value.startswith(CUDA_NAMES)
    return isinstance(value, torch.device) and value.type == "cuda"


def _names_cuda(args: Any, kwargs: Any) -> bool:
    return any(_is_cuda(each) for each in args) or _is_cuda(kwargs.get("device"))


def _redirect(value: Any) -> Any:
    return torch.device("meta") if _is_cuda(value) else value
