"""Real values beside meta tensors of integers and truth values, so that what depends on them can be decided.

Positions, masks and the experts that a router chose decide sizes (``nonzero``, ``tolist``, ``bincount``), but a meta
tensor holds no values. Whatever is computed from known integers alone is computed for real as well, on the CPU, as long
as it is small. Where integers come out of unknown floats, such as the experts that ``topk`` picks from a router's
scores, a stated distribution stands in (:class:`Routing`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_map

from ullage.errors import InputError
from ullage.i18n import _
from ullage.trace.recorder.arguments import arguments_of

#: Larger tensors are not followed.
MAX_ELEMENTS = 1 << 24
_WHOLE = frozenset((torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64))
aten = torch.ops.aten
#: The last output is chosen by values, be they known or not: indices.
_CHOOSING = frozenset((aten.topk.default, aten.sort.default, aten.sort.stable, aten.argmax.default))
#: Values of the inputs do not matter.
_BLIND = frozenset(
    (
        aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.new_zeros.default,
        aten.new_ones.default, aten.new_full.default, aten.empty_like.default, aten.new_empty.default,
    )
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Routing:
    """How tokens spread over experts: ``skew`` 0 is balanced; else expert e gets a share like 1 / (e + 1) ** skew."""

    skew: float = 0.0

    def choices(self, shape: tuple[int, ...], num_experts: int) -> torch.Tensor:
        """Return k distinct choices of ``num_experts`` for each row of ``shape`` (..., k)."""
        width = shape[-1] if shape else 1
        rows = max(1, torch.Size(shape).numel() // max(1, width))
        if width >= num_experts:
            return torch.arange(width).expand(shape).clone()
        if not self.skew:
            flat = (torch.arange(rows).unsqueeze(1) * width + torch.arange(width)) % num_experts
            return flat.reshape(shape).clone()
        weights = 1.0 / torch.arange(1, num_experts + 1, dtype=torch.float64) ** self.skew
        generator = torch.Generator().manual_seed(0)
        return torch.multinomial(weights.expand(rows, -1), width, generator=generator).reshape(shape)


class Shadows:
    """The values beside storages, by the address of the storage object."""

    def __init__(self, routing: Routing) -> None:
        self.routing = routing
        self.values: dict[int, Any] = {}
        self.chose = False

    def forget(self, key: int) -> None:
        """Drop the values of a storage that died."""
        self.values.pop(key, None)

    def give(self, tensor: Any, value: Any) -> None:
        """Say what a fresh meta tensor holds."""
        if value is not None and value.dtype in _WHOLE and value.numel() <= MAX_ELEMENTS:
            self._store(tensor, value)

    def _store(self, tensor: Any, value: Any) -> None:
        storage = tensor.untyped_storage()
        flat = torch.empty(storage.nbytes() // tensor.element_size(), dtype=tensor.dtype)
        flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).copy_(value)
        self.values[storage._cdata] = flat

    def of(self, tensor: Any) -> Any:
        """Return the values of a meta tensor, None where they are unknown."""
        if tensor.dtype not in _WHOLE:
            return None
        flat = self.values.get(tensor.untyped_storage()._cdata)
        if flat is None or flat.dtype != tensor.dtype:
            return None
        return flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def known(self, tensor: Any, func: Any) -> Any:
        """Return the values of a meta tensor.

        Raises:
            InputError: they are not known.
        """
        value = self.of(tensor)
        if value is None:
            raise InputError(
                _("{op} needs values, and a trace without a GPU has none").format(
                    op=func.name().removeprefix("aten::")
                ),
                remedy=_("leave it out of the traced step, or give the sizes that depend on it as constants"),
            )
        return value

    def follow(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Compute the values of an operator's output where those of its inputs are known."""
        if func in _CHOOSING:
            self._choose(func, args, kwargs, out)
            return
        first = out[0] if isinstance(out, (tuple, list)) and out else out
        if not isinstance(first, torch.Tensor) or first.dtype not in _WHOLE or first.device.type != "meta":
            return
        if first.numel() > MAX_ELEMENTS or any(
            alias.alias_info and not alias.alias_info.is_write for alias in func._schema.returns
        ):
            return  # a view: it shares the values of its base
        with_values = self._replace(func, args, kwargs)
        if with_values is None:
            self._invalidate(func, args)
            return
        try:
            value = func(*with_values[0], **with_values[1])
        except Exception:  # a kernel that no CPU has: the values stay unknown
            self._invalidate(func, args)
            return
        for meta, real in zip(
            *(each if isinstance(each, (tuple, list)) else [each] for each in (out, value)), strict=False
        ):
            if isinstance(meta, torch.Tensor) and isinstance(real, torch.Tensor) and meta.shape == real.shape:
                if func._schema.is_mutable and meta.untyped_storage()._cdata in self.values:
                    continue  # written in place, through the view of the values
                if meta.dtype in _WHOLE and meta.device.type == "meta":
                    self._store(meta, real)

    def _choose(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        source, outs = args[0], out if isinstance(out, (tuple, list)) else (out,)
        value = self.of(source)
        if value is not None:
            real = func(value, *args[1:], **kwargs)
            for meta, one in zip(outs, real if isinstance(real, (tuple, list)) else (real,), strict=True):
                self.give(meta, one)
            return
        chosen, axis = outs[-1], arguments_of(func, args, kwargs)["dim"]
        last = source.dim() and chosen.dim() == source.dim() and axis in (-1, source.dim() - 1)
        if last and chosen.numel() <= MAX_ELEMENTS:
            self.chose = self.chose or chosen.shape[-1] < source.shape[-1]
            self.give(chosen, self.routing.choices(tuple(chosen.shape), source.shape[-1]))

    def _replace(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        missing = False

        def real(each: Any) -> Any:
            nonlocal missing
            if isinstance(each, torch.Tensor) and each.device.type == "meta":
                value = self.of(each)
                if value is None:
                    if func in _BLIND:
                        return torch.empty_like(each, device="cpu")
                    missing = True
                return value
            return torch.device("cpu") if isinstance(each, torch.device) else each

        replaced = tree_map(real, (args, kwargs))
        return None if missing else (replaced[0], replaced[1])

    def _invalidate(self, func: Any, args: Any) -> None:
        """Forget values that unknown ones were written over."""
        if func._schema.is_mutable:
            for argument, value in zip(func._schema.arguments, args, strict=False):
                if argument.alias_info and argument.alias_info.is_write and isinstance(value, torch.Tensor):
                    self.values.pop(value.untyped_storage()._cdata, None)
