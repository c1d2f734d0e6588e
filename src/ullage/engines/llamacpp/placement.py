"""Which buffer each tensor and each layer's cache goes to.

Devices are 0, 1, ...; :data:`~ullage.engines.llamacpp.schedule.HOST` is host memory.
Source: ik_llama.cpp@58f08e43:src/llama.cpp:llm_load_tensors (buft_layer, splits), create_tensor (overrides first);
    llama.cpp@b7000:src/llama-model.cpp:load_tensors, common/common.cpp:tensor_buft_overrides.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from itertools import accumulate

from ullage.engines.llamacpp.gguf_names import GgufTensor
from ullage.engines.llamacpp.schedule import HOST
from ullage.engines.llamacpp.settings import Settings
from ullage.errors import InputError, LayoutError
from ullage.frozen import Frozen
from ullage.i18n import _

#: the split buffer of ``-sm row``: matrices spread by rows over all devices
SPLIT = -2


class Placement(Frozen):
    """``layers``: device of each layer's vectors, cache and computation; ``output``: of the output layer."""

    layers: tuple[int, ...]
    output: int
    tensors: tuple[int, ...]


def split_points(settings: Settings, free_bytes: tuple[int, ...]) -> tuple[float, ...]:
    """Return the running shares of the devices: ``-ts``, else free memory."""
    shares: tuple[float, ...] = tuple(float(amount) for amount in free_bytes)
    if settings.tensor_split is not None:
        given = settings.tensor_split[: settings.num_devices]
        shares = (*given, *(0.0 for _index in range(settings.num_devices - len(given))))
    total = sum(shares)
    if total <= 0:
        raise LayoutError(_("no device has a share of the layers"))
    return tuple(part / total for part in accumulate(shares))


def layer_devices(num_layers: int, settings: Settings, free_bytes: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """Return the device of each layer and of the output layer.

    Formula: the last k of n + 1 layers are offloaded; layer i of them goes to the first device whose running share
        exceeds (i - start) / k. The output layer is the last to be offloaded, start = n - ngl; in mainline since
        December 2025 it is the first, start = n + 1 - ngl.
    """
    count = min(settings.n_gpu_layers, num_layers + 1)
    if settings.num_devices == 0 or count == 0:
        return (HOST,) * num_layers, HOST
    start = max(num_layers + (1 if settings.output_first else 0) - settings.n_gpu_layers, 0)
    output_offloaded = settings.output_first or settings.n_gpu_layers > num_layers
    if settings.split_mode != "layer" or settings.num_devices == 1:
        device = settings.main_gpu
        return (HOST,) * start + (device,) * (num_layers - start), device if output_offloaded else HOST
    points = split_points(settings, free_bytes)
    last = settings.num_devices - 1

    def device_of(index: int) -> int:
        return min(bisect_right(points, index / count), last)

    layers = tuple(HOST if index < start else device_of(index - start) for index in range(num_layers))
    return layers, device_of(count - 1) if output_offloaded else HOST


def place(
    tensors: tuple[GgufTensor, ...], settings: Settings, free_bytes: tuple[int, ...], num_layers: int
) -> Placement:
    """Place every tensor: overrides first, then embeddings on the host, the rest with its layer.

    Raises:
        InputError: an override names a buffer that there is not.
    """
    layers, output = layer_devices(num_layers, settings, free_bytes)
    patterns = [(re.compile(pattern), _buffer(name, settings)) for pattern, name in settings.overrides]
    row = settings.split_mode == "row" and settings.num_devices > 0
    places = []
    for tensor in tensors:
        target = next((buffer for pattern, buffer in patterns if pattern.search(tensor.name)), None)
        if target is None:
            if tensor.layer >= 0:
                target = layers[tensor.layer]
            else:
                target = output if tensor.name.startswith(("output", "other")) else HOST
            if row and target != HOST and not tensor.vector and len(tensor.shape) == 2:
                target = SPLIT
        places.append(target)
    return Placement(layers=layers, output=output, tensors=tuple(places))


def _buffer(name: str, settings: Settings) -> int:
    """Return the device of a buffer name such as ``CPU``, ``CUDA1`` or ``Vulkan0``."""
    if name.upper().startswith(("CPU", "HOST")) or settings.num_devices == 0:
        return HOST
    match = re.fullmatch(r"([A-Za-z]+)(\d*)(_Host)?", name)
    if match and match[3]:
        return HOST
    if not match or int(match[2] or 0) >= settings.num_devices:
        raise InputError(
            _("there is no buffer {name!r} on {count} devices").format(name=name[:40], count=settings.num_devices),
            remedy=_("known are CPU and CUDA0 to CUDA{last}").format(last=settings.num_devices - 1),
        )
    return int(match[2] or 0)


def padded_bytes(tensor: GgufTensor, size: int, *, on_device: bool) -> int:
    """Return the bytes that a buffer reserves for a tensor.

    Formula: rounded up to 128 bytes on a device, 32 on the host. (CUDA pads rows to a multiple of 512 values at the
        end of a quantised matrix; below 10 KiB each.)
    Source: llama.cpp@b7000:ggml/src/ggml-cuda/ggml-cuda.cu:ggml_backend_cuda_buffer_type_get_alignment.
    """
    alignment = 128 if on_device else 32
    return -(-size // alignment) * alignment
