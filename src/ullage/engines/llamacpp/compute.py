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
    cells = settings.n_ctx if settings.kv_unified else settings.sequence_ctx
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
    if output == HOST and _offloads(settings):
        names = ("output.weight", "token_embd.weight")
        by_name = {tensor.name: size for tensor, size in zip(contents.tensors, contents.sizes, strict=True)}
        output, offload = 0, next(by_name[name] for name in names if name in by_name)
    graph = decoder_graph(model, graph_settings(model, settings), places, output, offload)
    return buffer_sizes(graph, settings.pipeline_copies if pipelined else 1)


Parts = dict[str, tuple[int, int, str]]  # part of a layer → (where, bytes, type)
_ROLES = {"attn_q": "q", "attn_k": "k", "attn_v": "v", "attn_output": "output"} | {
    f"ffn_{part}": part for part in ("up", "gate", "down")
}


def layer_places(model: Model, settings: Settings, contents: Contents, placement: Placement) -> tuple[LayerPlace, ...]:
    """Return where each layer computes, and which host matrices are copied to device 0 for a large batch.

    Source: ik_llama.cpp@58f08e43:ggml/src/ggml-cuda.cu:ggml_backend_cuda_offload_op (batches of 32 and more),
        ggml_backend_cuda_supports_op; ggml-backend.c:ggml_backend_sched_backend_id_from_cur (the first device).
    """
    dense, experts = _parts_of_layers(contents, placement)
    found = []
    for index, backend in enumerate(placement.layers):
        parts, routed = dense.get(index, {}), experts.get(index, {})
        copied = tuple(
            (role, size) for role, (where, size, kind) in parts.items() if where == HOST and _on_device(kind, settings)
        )
        offload = _expert_copies(routed, settings)
        if backend == HOST and copied and settings.latent_cache == "":
            caches = _host_cache(index, model, settings)
            place = LayerPlace(backend=0, experts=0, offload_bytes=offload, host_weights=copied, host_cache=caches)
        else:
            where = routed["down"][0] if "down" in routed else backend
            down = parts.get("down", (backend, 0, ""))
            place = LayerPlace(
                backend=backend,
                experts=backend if where < HOST else where,
                offload_bytes=offload if backend != HOST else None,
                dense_on_host=down[0] == HOST and backend != HOST and not _on_device(down[2], settings),
                host_weights=copied if backend != HOST else (),
            )
        found.append(place)
    return tuple(found)


def _parts_of_layers(contents: Contents, placement: Placement) -> tuple[dict[int, Parts], dict[int, Parts]]:
    """Return the dense matrices and the routed experts of each layer by role."""
    dense: dict[int, Parts] = {}
    experts: dict[int, Parts] = {}
    for tensor, kind, size, where in zip(
        contents.tensors, contents.types, contents.sizes, placement.tensors, strict=True
    ):
        if tensor.layer < 0 or tensor.vector or not tensor.name.endswith(".weight"):
            continue
        name = tensor.name.split(".", 2)[2].removesuffix(".weight")
        role = _ROLES.get(name.removesuffix("_exps"))
        if role:
            (experts if tensor.experts else dense).setdefault(tensor.layer, {})[role] = (where, size, kind)
    return dense, experts


def _offloads(settings: Settings) -> bool:
    """Whether host matrices are copied to device 0 to be multiplied: batches of 32 tokens and more."""
    return bool(settings.num_devices) and settings.op_offload and settings.n_ubatch >= 32


def _on_device(kind: str, settings: Settings) -> bool:
    """Whether a host matrix of this type is copied: the device must know the type that ``-rtr`` leaves it in."""
    stored = _stored_type(kind, settings)
    return _offloads(settings) and (stored == plain_of(stored) or stored in _ON_CUDA)


def _expert_copies(routed: Parts, settings: Settings) -> tuple[int, int, int] | None:
    """Return the bytes of host experts (up, gate, down) that are copied, None when none are."""
    if not routed or any(where != HOST or not _on_device(kind, settings) for where, _size, kind in routed.values()):
        return None
    up, gate, down = (routed.get(name, (HOST, 0, ""))[1] for name in ("up", "gate", "down"))
    return up, gate, down


def _host_cache(index: int, model: Model, settings: Settings) -> tuple[int, int]:
    """Return the bytes of keys and of values of a layer whose cache is in host memory."""
    part = next((mixer for mixer in model.layers[index].mixers if isinstance(mixer, Attention)), None)
    if part is None:
        return 0, 0
    cells = graph_settings(model, settings).num_kv
    key, value = ggml_type(settings.cache_type_k), ggml_type(settings.cache_type_v)
    return (
        cells * key.tensor_bytes((part.num_kv_heads * part.head_dim,)),
        cells * value.tensor_bytes((part.num_kv_heads * (part.v_head_dim or part.head_dim),)),
    )


def _stored_type(kind: str, settings: Settings) -> str:
    """Return the type of a host tensor after ``-rtr``, which interleaves its rows."""
    if not settings.repack or kind != plain_of(kind):
        return kind
    return kind + ("_R8" if kind in ("Q4_0", "Q8_0", "IQ4_XS") else "_R4")
