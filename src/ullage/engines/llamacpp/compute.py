"""The compute buffers of a job, with the range over what its record leaves open.

Source: see :mod:`ullage.engines.llamacpp.schedule` and :mod:`ullage.engines.llamacpp.graph`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ullage.account.gguf_types import ggml_type
from ullage.engines.llamacpp.graph import LayerPlace, decoder_graph
from ullage.engines.llamacpp.kv import window_cells
from ullage.engines.llamacpp.latent_graph import ABSORBED
from ullage.engines.llamacpp.mixes import plain_of
from ullage.engines.llamacpp.nodes import GraphSettings
from ullage.engines.llamacpp.placement import Placement
from ullage.engines.llamacpp.recipe import Contents
from ullage.engines.llamacpp.schedule import HOST, buffer_sizes
from ullage.engines.llamacpp.settings import Settings
from ullage.engines.serving import Amount
from ullage.spec.model import Attention, Model
from ullage.spec.serving import ServingJob

#: relative error of the derived buffer, below and above. Reproduced to the last digit on ik_llama.cpp logs of 2025;
#: mainline's graphs changed more often than this module follows, and ollama builds graphs of its own.
_ERROR = {"ik_llama.cpp": (0.03, 0.05), "llamacpp": (0.08, 0.15), "ollama": (0.15, 0.25)}
#: interleaved types that CUDA computes with (others stay on the host): ik_llama.cpp@58f08e43:ggml/src/ggml-cuda.cu
_ON_CUDA = ("IQ2_K_R4", "IQ3_K_R4", "IQ4_K_R4", "IQ5_K_R4", "IQ4_KS_R4", "IQ5_KS_R4", "IQ1_S_R4", "IQ1_M_R4")


def compute_buffers(job: ServingJob, settings: Settings, contents: Contents, placement: Placement) -> dict[int, Amount]:
    """Return the compute buffer of each backend in bytes, the host's under :data:`HOST`."""
    runs = [_sizes(job.model, variant, contents, placement) for variant in _variants(job, settings)]
    below, above = _ERROR[settings.engine]
    slack = 2 * job.model.hidden_size * settings.n_ubatch * 4
    found = {}
    for backend in runs[0]:
        values = [run.get(backend, 0) for run in runs]
        low, high = min(values), max(values)
        found[backend] = Amount(value=values[0], low=max(0, low * (1 - below) - slack), high=high * (1 + above) + slack)
    return found


def _variants(job: ServingJob, settings: Settings) -> Iterator[Settings]:
    """Yield the settings, likeliest first, that what is known of the job allows."""
    # what a log leaves open: the fork's guides advise -fmoe for every mixture of experts
    first = replace(settings, fused_moe=settings.fused_moe is not False)
    yield first
    if settings.fused_moe is None:
        yield replace(first, fused_moe=False)
    if settings.engine == "ollama" and job.max_num_batched_tokens is None:
        larger = min(2 * settings.n_ubatch, settings.n_ctx)
        yield replace(first, n_ubatch=larger, num_outputs=larger)


def graph_settings(model: Model, settings: Settings) -> GraphSettings:
    """Return what of the settings shapes the graph."""
    cells = settings.n_ctx if settings.kv_unified else settings.n_ctx // settings.parallel
    windows = [
        part.window for layer in model.layers for part in layer.mixers if isinstance(part, Attention) and part.window
    ]
    mode = settings.mla
    if not settings.ik:
        mode = 0 if settings.latent_cache in ("", "expanded") else ABSORBED
    key = ggml_type(settings.cache_type_k)
    return GraphSettings(
        num_tokens=settings.n_ubatch,
        num_outputs=settings.num_outputs,
        num_kv=cells,
        window_kv=window_cells(max(windows), settings) if windows and settings.window_cache else 0,
        flash_attention=settings.flash_attention,
        latent_mode=mode,
        attention_max_mib=settings.attention_max_mib,
        cache_bytes_per_value=key.block_bytes / key.block_size,
        host_only=settings.num_devices == 0,
        fused_moe=bool(settings.fused_moe),
        ik=settings.ik,
        fused_glu=settings.fused_glu,
        mask_f16=settings.mask_f16,
        groups_one_by_one=settings.groups_one_by_one,
    )


def _sizes(model: Model, settings: Settings, contents: Contents, placement: Placement) -> dict[int, int]:
    pipelined = (
        settings.num_devices > 1
        and settings.n_gpu_layers > len(model.layers)
        and settings.split_mode == "layer"
        and settings.kv_offload
    )
    places = layer_places(model, settings, contents, placement)
    output, offload = placement.output, 0
    if output == HOST and settings.num_devices and settings.op_offload and settings.n_ubatch >= 32:
        names = ("output.weight", "token_embd.weight")
        by_name = {tensor.name: size for tensor, size in zip(contents.tensors, contents.sizes, strict=True)}
        output, offload = 0, next(by_name[name] for name in names if name in by_name)
    graph = decoder_graph(model, graph_settings(model, settings), places, output, offload)
    return buffer_sizes(graph, settings.pipeline_copies if pipelined else 1)


def layer_places(model: Model, settings: Settings, contents: Contents, placement: Placement) -> tuple[LayerPlace, ...]:
    """Return where each layer computes, and which host experts are copied to device 0 for a large batch.

    Source: ik_llama.cpp@58f08e43:ggml/src/ggml-cuda.cu:ggml_backend_cuda_offload_op (batches of 32 and more),
        ggml_backend_cuda_supports_op; ggml-backend.c:ggml_backend_sched_backend_id_from_cur (the first device).
    """
    experts: dict[int, dict[str, tuple[int, int, str]]] = {}
    dense: dict[int, int] = {}
    for tensor, kind, size, where in zip(
        contents.tensors, contents.types, contents.sizes, placement.tensors, strict=True
    ):
        if tensor.experts and tensor.name.endswith("weight"):
            part = tensor.name.split("ffn_", 1)[-1].split("_", 1)[0]
            experts.setdefault(tensor.layer, {})[part] = (where, size, kind)
        elif ".ffn_down.weight" in tensor.name:
            dense[tensor.layer] = where
    found = []
    for index, backend in enumerate(placement.layers):
        parts = experts.get(index, {})
        where = parts["down"][0] if "down" in parts else backend
        offload = None
        if where == HOST and backend != HOST and settings.op_offload and settings.n_ubatch >= 32:
            kinds = [_stored_type(kind, settings) for _where, _size, kind in parts.values()]
            if all(kind == plain_of(kind) or kind in _ON_CUDA for kind in kinds):
                up, gate, down = (parts.get(name, (HOST, 0, ""))[1] for name in ("up", "gate", "down"))
                offload = (up, gate, down)
        found.append(
            LayerPlace(
                backend=backend,
                experts=backend if where < HOST else where,
                offload_bytes=offload,
                dense_on_host=dense.get(index, backend) == HOST and backend != HOST,
            )
        )
    return tuple(found)


def _stored_type(kind: str, settings: Settings) -> str:
    """Return the type of a host tensor after ``-rtr``, which interleaves its rows."""
    if not settings.repack or kind != plain_of(kind):
        return kind
    return kind + ("_R8" if kind in ("Q4_0", "Q8_0", "IQ4_XS") else "_R4")
