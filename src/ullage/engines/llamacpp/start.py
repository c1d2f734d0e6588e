"""The start of llama.cpp, ik_llama.cpp and ollama: buffers per device, and whether they fit."""

from __future__ import annotations

from dataclasses import replace

from ullage.engines.llamacpp import log
from ullage.engines.llamacpp.compute import compute_buffers
from ullage.engines.llamacpp.defaults import default
from ullage.engines.llamacpp.gguf_names import LatentStorage
from ullage.engines.llamacpp.kv import LayerCache, caches
from ullage.engines.llamacpp.placement import SPLIT, Placement, padded_bytes, place
from ullage.engines.llamacpp.recipe import Contents, contents, file_type
from ullage.engines.llamacpp.schedule import HOST
from ullage.engines.llamacpp.settings import Settings, resolve
from ullage.engines.serving import Amount, EngineStart, KvCost, RankClass
from ullage.frozen import Frozen
from ullage.i18n import _
from ullage.ledger import Certainty, Ledger, Term, exact, ranged, total
from ullage.spec.model import LatentAttention
from ullage.spec.serving import ServingJob
from ullage.units import format_bytes

#: file types that are likely when none is stated (ollama's library held Q4_0 until autumn 2024, then Q4_K_M)
_USUAL = {"llamacpp": ("Q4_K_M",), "ik_llama.cpp": ("Q4_K_M",), "ollama": ("Q4_0", "Q4_K_M")}
_LOAD = "ik_llama.cpp@58f08e43:src/llama.cpp:llm_load_tensors"
_CACHE = "ik_llama.cpp@58f08e43:src/llama.cpp:llama_kv_cache_init"
_RESERVE = "ik_llama.cpp@58f08e43:ggml/src/ggml-backend.c:ggml_backend_sched_reserve"


class Device(Frozen):
    """What one device (or the host) holds, in bytes; ``extra``: latent projections computed at load time."""

    number: int
    weights: Amount
    kv_cache: Amount
    compute: Amount
    extra: int


def start(job: ServingJob) -> EngineStart:
    """Run the start arithmetic.

    Raises:
        InputError: a flag cannot be read.
        LayoutError: a placement that cannot be.
    """
    settings = resolve(job)
    file = contents(job.model, job.quantization, latent_storage(job, settings), usual=_USUAL[job.engine])
    layers = caches(job.model, settings)
    placement, devices = _spread(job, settings, file, layers)
    ranks = sorted((_rank(device, job, settings) for device in devices), key=_fullness, reverse=True)
    limit = job.device_total_bytes or job.machine.gpu.total_bytes
    worst = ranks[0].ledger.device_used
    reason = _why_not(ranks[0].ledger, settings, limit)
    resolved = replace(
        job,
        max_model_len=settings.sequence_ctx,
        max_num_seqs=settings.parallel,
        max_num_batched_tokens=settings.n_ubatch,
        assumed=(*job.assumed, *settings.assumed, *file.assumed),
    )
    fullest = max(devices, key=lambda device: device.kv_cache.value)
    cells = settings.n_ctx
    cost = _cost([layers[index] for index, number in enumerate(placement.layers) if number == fullest.number])
    return EngineStart(
        job=resolved,
        ranks=tuple(ranks),
        starts=not reason,
        reason=reason,
        figures=_figures(job, settings, file, devices, layers),
        log_lines=log.lines(settings, [(d.number, d.weights, d.kv_cache, d.compute) for d in devices], layers),
        kv=cost,
        kv_cache_bytes=fullest.kv_cache,
        kv_cache_tokens=_certain(cells),
        max_concurrency=_certain(cells / settings.sequence_ctx),
        max_context=_longest(settings, cost, worst, limit),
        host_load_peak_bytes=_host_bytes(file, placement),
        warnings=_warnings(settings, worst, limit),
    )


def _why_not(ledger: Ledger, settings: Settings, limit: int) -> str:
    """Return why the fullest device cannot hold its share; empty when it can.

    A log does not print ``-ts``, which may have moved layers: then only what no split could hold is ruled out.
    """
    used = ledger.device_used
    need = used.bytes if settings.split_known else used.low_bytes
    if settings.num_devices == 0 or need <= limit:
        return ""
    return _("device {number} would need {need} of {total}").format(
        number=ledger.rank, need=format_bytes(used.bytes), total=format_bytes(limit)
    )


def _spread(
    job: ServingJob, settings: Settings, file: Contents, layers: tuple[LayerCache, ...]
) -> tuple[Placement, list[Device]]:
    """Place everything and sum it up per device; the host stands alone when there is no device."""
    placement = place(file.tensors, settings, _free_bytes(job, settings), len(job.model.layers))
    buffers = compute_buffers(job, settings, file, placement)
    numbers = range(settings.num_devices) if settings.num_devices else (HOST,)
    largest = _largest_layer(file)
    return placement, [_device(number, job, settings, file, placement, layers, buffers, largest) for number in numbers]


def _largest_layer(file: Contents) -> int:
    """Return the bytes of the largest layer."""
    sums: dict[int, int] = {}
    for tensor, size in zip(file.tensors, file.sizes, strict=True):
        if tensor.layer >= 0:
            sums[tensor.layer] = sums.get(tensor.layer, 0) + size
    return max(sums.values(), default=0)


def latent_storage(job: ServingJob, settings: Settings) -> LatentStorage:
    """Return how the file holds the latent key-value projection: see :data:`gguf_names.LatentStorage`."""
    from ullage.account.gguf_types import ggml_type
    from ullage.engines.llamacpp.mixes import base_type

    name = file_type(job.quantization or "")
    if settings.ik and name and ggml_type(base_type(name) or name).number > 96:
        return "both"
    if settings.latent_cache == "expanded":
        return "whole"
    return "split" if settings.day >= "2025-05" else "whole"


def _free_bytes(job: ServingJob, settings: Settings) -> tuple[int, ...]:
    amount = job.device_free_bytes or job.device_total_bytes or job.machine.gpu.total_bytes
    return (amount,) * settings.num_devices


def _device(
    number: int,
    job: ServingJob,
    settings: Settings,
    file: Contents,
    placement: Placement,
    layers: tuple[LayerCache, ...],
    buffers: dict[int, Amount],
    largest_layer_bytes: int,
) -> Device:
    """Sum up one device. With ``-sm row`` the split matrices are shared out evenly; small parts are on the main one."""
    lists = [_weights_on(number, sizes, job, file, placement, settings) for sizes in (file.sizes, *file.spread)]
    slack = 0.0 if file.exact and not file.assumed else 0.03
    held = [index for index, device in enumerate(placement.layers) if device == number]
    if not settings.kv_offload:
        held = list(range(len(placement.layers))) if number == HOST else []
    weights = Amount(value=lists[0], low=min(lists) * (1 - slack - 0.001), high=max(lists) * (1 + slack + 0.001))
    cache_bytes = sum(layers[index].num_bytes for index in held)
    cache = Amount(value=cache_bytes, low=cache_bytes * 0.995, high=cache_bytes * 1.005)
    if settings.num_devices > 1 and settings.tensor_split is None and settings.split_mode == "layer":
        mean = weights.value / max(len(held), 1)
        layers_off = 1 if settings.split_known else 2
        weights = _uneven(weights, layers_off * (mean if settings.overrides else max(mean, largest_layer_bytes)))
        cache = _uneven(cache, layers_off * max((layer.num_bytes for layer in layers), default=0))
    return Device(
        number=number,
        weights=weights,
        kv_cache=cache,
        compute=buffers.get(number, Amount(value=0, low=0, high=0)),
        extra=_computed_latents(job, settings, held),
    )


def _uneven(amount: Amount, difference: float) -> Amount:
    """Widen a device's share: without ``-ts`` the split goes by free memory, which differs from card to card.

    One layer either way; two when the job is known from a log, which does not print ``-ts``.
    """
    low = max(0.0, amount.low - difference)
    return Amount(value=amount.value, low=low, high=amount.high + difference)


def _weights_on(
    number: int, sizes: tuple[int, ...], job: ServingJob, file: Contents, placement: Placement, settings: Settings
) -> int:
    """Return the bytes of the model buffer of ``number``; a tied embedding has a second copy as the output matrix."""
    on_device, found = number != HOST, 0
    for tensor, size, where in zip(file.tensors, sizes, placement.tensors, strict=True):
        if where == number:
            found += padded_bytes(tensor, size, on_device=on_device)
        elif where == SPLIT and on_device:
            found += size // settings.num_devices
        if job.model.tied_embeddings and tensor.name == "token_embd.weight" and placement.output == number != where:
            found += size
    return found


def _computed_latents(job: ServingJob, settings: Settings, held: list[int]) -> int:
    """Return the bytes of latent projections that ik_llama.cpp computes at load, in Q8_0, outside the model buffer.

    Formula: per layer N x rkv x (Dn + Dv) x 34/32: k_b and v_b from a whole kv_b, or kv_b from the two.
    Source: ik_llama.cpp@58f08e43:src/llama.cpp:llm_prepare_mla.
    """
    if not settings.ik or settings.mla == 0 or latent_storage(job, settings) == "both":
        return 0
    parts = [p for index in held for p in job.model.layers[index].mixers if isinstance(p, LatentAttention)]
    return sum(p.num_heads * p.kv_lora_rank * (p.qk_nope_head_dim + p.v_head_dim) * 34 // 32 for p in parts)


def _term(name: str, amount: Amount, formula: str, source: str, *, certain: bool) -> Term:
    return ranged(
        name,
        int(amount.value),
        low=int(amount.low),
        high=int(amount.high) + 1,
        formula=formula,
        source=source,
        certainty=Certainty.MODELLED if certain else Certainty.ASSUMED,
    )


def _rank(device: Device, job: ServingJob, settings: Settings) -> RankClass:
    parts = [
        _term("weights", device.weights, _("tensors placed on it"), _LOAD, certain=True),
        _term("kv_cache", device.kv_cache, _("cells x bytes of its layers"), _CACHE, certain=True),
        _term("activation_peak", device.compute, _("compute buffer of the worst-case graph"), _RESERVE, certain=True),
    ]
    if device.extra:
        parts.append(exact("latent_projections", device.extra, source=_LOAD))
    outside = []
    if device.number != HOST:
        low, middle, high = default(settings.engine, "context_bytes", settings.day)
        outside.append(ranged("context", middle, low=low, high=high, formula=_("CUDA context, kernels and cuBLAS")))
    ledger = Ledger(
        rank=max(device.number, 0),
        allocated=total("allocated", parts),
        reserved_overhead=exact("reserved_overhead", 0),
        outside=total("outside", outside),
    )
    return RankClass(pp_rank=max(device.number, 0), num_ranks=1, ledger=ledger)


def _fullness(rank: RankClass) -> int:
    return rank.ledger.device_used.bytes


def _sum(amounts: list[Amount]) -> Amount:
    return Amount(
        value=sum(amount.value for amount in amounts),
        low=sum(amount.low for amount in amounts),
        high=sum(amount.high for amount in amounts),
    )


def _figures(
    job: ServingJob, settings: Settings, file: Contents, devices: list[Device], layers: tuple[LayerCache, ...]
) -> dict[str, Amount]:
    """Return the log's figures: of device 0 (the host without one); the split buffer in all with ``-sm row``.

    ollama's estimate line speaks of the whole model on the device, offloaded or not.
    """
    first = devices[0]
    if settings.engine == "ollama" and settings.num_devices and settings.n_gpu_layers <= len(job.model.layers):
        first = _spread(job, replace(settings, n_gpu_layers=len(job.model.layers) + 1), file, layers)[1][0]
    weights = first.weights
    if settings.split_mode == "row":
        weights = _sum([device.weights for device in devices])
    return {
        "weights": weights,
        "kv_cache": first.kv_cache,
        "activation_peak": first.compute,
        "total": _sum([weights, first.kv_cache, first.compute]),
    }


def _host_bytes(file: Contents, placement: Placement) -> int:
    return sum(size for size, where in zip(file.sizes, placement.tensors, strict=True) if where == HOST)


def _warnings(settings: Settings, worst: Term, limit: int) -> tuple[str, ...]:
    margin = default(settings.engine, "fit_margin_mib", settings.day)
    found = []
    if settings.num_devices and margin and worst.bytes <= limit < worst.bytes + margin * 2**20:
        found.append(_("less than the {margin} MiB stay free that --fit keeps").format(margin=margin))
    if settings.num_devices and settings.fit and worst.bytes > limit:
        found.append(
            _("--fit is on: the start would shorten the context or keep layers on the host instead of failing")
        )
    if settings.num_devices and not settings.kv_offload:
        found.append(_("the cache is in host memory (-nkvo): attention scratch on the device is overstated"))
    return tuple(found)


def _certain(value: float) -> Amount:
    return Amount(value=value, low=value, high=value)


def _longest(settings: Settings, cost: KvCost, worst: Term, limit: int) -> Amount:
    """Return the longest context that fits beside the rest; compute buffers grow with it, hence the wide range."""
    free = max(0, limit - worst.bytes) if settings.num_devices else 0
    longest = float(settings.n_ctx + (free // cost.bytes_per_token if cost.bytes_per_token else 0))
    return Amount(value=longest, low=longest * 0.8, high=longest * 1.1)


def _cost(held: list[LayerCache]) -> KvCost:
    """Return what a request costs on the device that holds these layers' caches; cells come in 256s."""
    slope = sum(layer.bytes_per_cell for layer in held if not layer.window)
    fixed = sum(layer.fixed_bytes + (layer.num_bytes if layer.window else 0) for layer in held)

    def cost(tokens: int) -> int:
        return fixed + slope * (-(-tokens // 256) * 256)

    return KvCost(bytes_per_token=slope, fixed_bytes_per_request=fixed, bytes_of_request=cost)
