"""Operators whose result depends on values: answered from the known values, or refused by name."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_map

from ullage.i18n import _

aten = torch.ops.aten


def _is_meta(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == "meta"


def _on_values(tracker: Any, func: Any, args: Any, kwargs: Any) -> Any:
    """Run the operator on the known values; give meta tensors of the sizes that come out."""

    def real(each: Any) -> Any:
        return tracker.shadows.known(each, func) if _is_meta(each) else each

    if not any(_is_meta(each) for each in args):
        return NotImplemented
    values = func(*tree_map(real, args), **tree_map(real, kwargs))

    def meta(each: Any) -> Any:
        if not isinstance(each, torch.Tensor):
            return each
        made = torch.empty(each.shape, dtype=each.dtype, device="meta")
        tracker.shadows.give(made, each)
        return made

    return tree_map(meta, values)


def _scalar(tracker: Any, func: Any, args: Any, kwargs: Any) -> Any:
    """Give a known number; an unknown float reads as 1."""
    source = args[0]
    if not _is_meta(source):
        return NotImplemented
    if source.dtype.is_floating_point:
        _assume_floats(tracker)
        return 1.0
    return tracker.shadows.known(source, func).item()


def _assume_floats(tracker: Any) -> None:
    sentence = _("values of floating-point tensors that the step reads are taken as 1")
    if sentence not in tracker.trace.assumed:
        tracker.trace.assumed.append(sentence)


def _to_host(tracker: Any, func: Any, args: Any, kwargs: Any) -> Any:
    """Copy to the host: the known values, or ones."""
    device = kwargs.get("device")
    if not _is_meta(args[0]) or device is None or torch.device(device).type == "meta":
        return NotImplemented
    source, dtype = args[0], kwargs.get("dtype") or args[0].dtype
    if source.dtype.is_floating_point:
        _assume_floats(tracker)
        return torch.ones(source.shape, dtype=dtype)
    return tracker.shadows.known(source, func).to(dtype)


def _copy(tracker: Any, func: Any, args: Any, kwargs: Any) -> Any:
    """Copy between meta and host in place."""
    target, source = args[0], args[1]
    if _is_meta(target) or not _is_meta(source):
        return NotImplemented
    host = _to_host(tracker, func, (source,), {"device": "cpu", "dtype": target.dtype})
    return target.copy_(host)


def _masked(tracker: Any, func: Any, args: Any, kwargs: Any) -> Any:
    """Select by a mask: its number of true values is the size."""
    source, mask = args
    if not _is_meta(source):
        return NotImplemented
    value = tracker.shadows.known(mask, func)
    shape = torch.broadcast_shapes(source.shape, mask.shape)
    return source.new_empty(int(value.expand(shape).sum()))


def _index(tracker: Any, func: Any, args: Any, kwargs: Any) -> Any:
    """Index with masks of truth values: each becomes the indices of its true values, as on a GPU."""
    source, indices, *rest = args
    if func is aten.index_put_.default and _fills(tracker, indices, *rest):
        return source
    if not any(_is_meta(each) and each.dtype in (torch.bool, torch.uint8) for each in indices if each is not None):
        return NotImplemented
    written: list[Any] = []
    for each in indices:
        if each is None or not _is_meta(each) or each.dtype not in (torch.bool, torch.uint8):
            written.append(each)
            continue
        for column in tracker.shadows.known(each, func).nonzero().unbind(1):
            made = torch.empty(column.shape, dtype=torch.int64, device="meta")
            tracker.note(made, "nonzero")
            written.append(made)
    return func(source, written, *rest, **kwargs)


def _fills(tracker: Any, indices: Any, values: Any, accumulate: Any = False) -> bool:
    """Say whether ``x[mask] = number`` is written: one kernel fills it, whatever the mask says.

    Source: torch@2.13.0:aten/src/ATen/native/TensorAdvancedIndexing.cpp:canDispatchToMaskedFill; indexing makes a
        number a tensor, which lies on the host there.
    """
    given = [each for each in indices if each is not None]
    if accumulate or len(given) != 1 or given[0].dtype not in (torch.bool, torch.uint8) or values.dim():
        return False
    number = tracker.number_of(values) if _is_meta(values) else None
    return number is None or tracker.trace.allocations[number].op == "scalar_tensor"


HANDLERS: dict[Any, Any] = {
    aten._local_scalar_dense.default: _scalar,
    aten._to_copy.default: _to_host,
    aten.copy_.default: _copy,
    aten.masked_select.default: _masked,
    aten.index.Tensor: _index,
    aten.index_put_.default: _index,
    **dict.fromkeys(
        (
            aten.nonzero.default,
            aten.bincount.default,
            aten._unique2.default,
            aten.unique_dim.default,
            aten.unique_consecutive.default,
            aten.repeat_interleave.Tensor,
            aten.equal.default,
            aten.is_nonzero.default,
        ),
        _on_values,
    ),
}
