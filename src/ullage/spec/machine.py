"""The machine that a job runs on."""

from __future__ import annotations

from ullage.frozen import Frozen


class Figure(Frozen):
    """One calibrated amount in bytes: the median of its samples, the least and the most."""

    name: str
    value: int
    low: int
    high: int


class Calibration(Frozen):
    """What was measured on this kind of GPU (``ullage calibrate``).

    Attributes:
        name, measured: of the profile, and when it was made.
        software: driver, CUDA and torch, in words.
        num_ranks: GPUs that spoke with each other while NCCL was measured.
        figures: the amounts.
    """

    name: str
    measured: str
    software: str = ""
    num_ranks: int = 1
    figures: tuple[Figure, ...] = ()

    def figure(self, name: str) -> Figure | None:
        """Return the amount of that name, None when it was not measured."""
        return next((figure for figure in self.figures if figure.name == name), None)


class Gpu(Frozen):
    """One kind of accelerator.

    Attributes:
        name: catalog name, or the size as typed for an anonymous card.
        total_bytes: what the runtime reports as the device's total (``cudaMemGetInfo``), not the marketing figure.
        total_low_bytes, total_high_bytes: the range over drivers and ECC settings; equal where it is known.
        bandwidth_bytes_per_s: memory bandwidth, None when unknown.
        flops: dense FLOP/s by number format, such as ``{"bfloat16": 989e12}``; a tuple of pairs to stay hashable.
        link_bytes_per_s: one direction of the GPU-to-GPU link.
        vendor: nvidia, amd, huawei, intel, google.
        compute_capability: NVIDIA's, such as (9, 0).
        unified: memory shared with the host (GB10, Apple).
        source: where the figures are from.
        calibration: what was measured on this kind of card, laid on by a fit (:mod:`ullage.catalog.calibration`).
    """

    name: str
    total_bytes: int
    total_low_bytes: int
    total_high_bytes: int
    bandwidth_bytes_per_s: float | None = None
    flops: tuple[tuple[str, float], ...] = ()
    link_bytes_per_s: float | None = None
    gpus_per_node: int = 8
    vendor: str = "nvidia"
    compute_capability: tuple[int, int] | None = None
    unified: bool = False
    source: str = ""
    calibration: Calibration | None = None


class Machine(Frozen):
    """``num_nodes`` nodes of ``gpus_per_node`` equal GPUs."""

    gpu: Gpu
    num_nodes: int = 1
    gpus_per_node: int = 1
    host_memory_bytes: int | None = None

    @property
    def num_gpus(self) -> int:
        """All GPUs of the machine."""
        return self.num_nodes * self.gpus_per_node
