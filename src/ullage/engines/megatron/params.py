"""The parameters of one rank as Megatron-LM holds them: shares under TP, EP and ETP, in buckets' order.

Fused projections (q, k and v; gate and up) are one tensor, since block rounding and dummy gradients go by tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from ullage.account.parameters import Parameter, Role, layer_parameters, model_parameters
from ullage.engines.megatron.layout import Chunk, Groups
from ullage.errors import LayoutError
from ullage.frozen import Frozen
from ullage.i18n import _
from ullage.spec.model import Layer, Model
from ullage.spec.training import TrainingJob, is_headless

#: Beyond so many tensors padding is left out.
MAX_TENSORS = 200_000
_FUSED = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "fc1", "up_proj": "fc1"}


class RankTensor(Frozen):
    """One parameter on one rank; ``expert``: sharded over the expert groups; ``linear``: weight of a GEMM."""

    name: str
    shape: tuple[int, ...]
    copies: int = 1
    expert: bool = False
    linear: bool = False
    shared_embedding: bool = False
    fp32: bool = False

    @property
    def num_elements(self) -> int:
        """Elements of all copies."""
        return math.prod(self.shape) * self.copies


def chunk_tensors(job: TrainingJob, chunk: Chunk, sizes: Groups, *, layers: bool = True) -> list[RankTensor]:
    """Parameters of a chunk in module order: layers (unless left out), multi-token prediction, embedding, norm, head.

    A tied head on another stage than the embedding is a second copy of it; so is the embedding beside MTP layers.
    Source: Megatron-LM@adc69db:megatron/core/models/gpt/gpt_model.py:GPTModel.__init__,
    megatron/core/models/common/language_module/language_module.py:setup_embeddings_and_output_layer.
    """
    model = job.model
    found: list[RankTensor] = []
    tied = model.tied_embeddings and not is_headless(job)
    tied_copy = chunk.head and tied and not chunk.embedding
    for placed in model_parameters(_without_layers(model), mtp=False, towers=False):
        name = placed.parameter.name
        if placed.section == "embedding" and (chunk.embedding or (chunk.mtp and "position" not in name)):
            found.append(_share(job, placed.parameter, sizes, shared=tied))
        elif _after_layers(placed.section, name, chunk):
            found.append(_share(job, placed.parameter, sizes))
    word = next(iter(model_parameters(_without_layers(model), mtp=False, towers=False))).parameter
    if tied_copy and not chunk.mtp:
        found.append(_share(job, word, sizes, shared=True))
    body: list[RankTensor] = []
    for index in chunk.layers if layers else ():
        body += layer_tensors(job, model.layers[index], sizes)
    if chunk.mtp:
        for placed in model_parameters(_without_layers(model), mtp=True, towers=False):
            if placed.section == "mtp":
                body += _merge([_share(job, placed.parameter, sizes)])
    return body + found


def _after_layers(section: str, name: str, chunk: Chunk) -> bool:
    """Final norms and the head stand on the last stage; BERT's token types beside the embedding."""
    if section == "final" and name.startswith("embeddings."):
        return chunk.embedding
    return section in ("final", "head") and chunk.head


def _without_layers(model: Model) -> Model:
    return replace(model, layers=())


def layer_tensors(job: TrainingJob, layer: Layer, sizes: Groups) -> list[RankTensor]:
    """Parameters of one layer on one rank."""
    return _merge(
        [
            _share(job, parameter, sizes)
            for parameter in layer_parameters(layer, job.model.hidden_size)
            if not parameter.buffer
        ]
    )


def _share(job: TrainingJob, parameter: Parameter, sizes: Groups, *, shared: bool = False) -> RankTensor:
    """Divide a tensor over TP (ETP for experts); an expert's copies over EP."""
    expert = parameter.role is Role.EXPERT
    tensor = sizes.expert_tensor if expert else job.parallel.tensor_parallel_size
    shape = list(parameter.shape)
    axis = {"out": 0, "vocab": 0, "in": len(shape) - 1}.get(parameter.split)
    if axis is not None and tensor > 1:
        parts = tensor if not parameter.units else min(tensor, math.gcd(tensor, parameter.units))
        if shape[axis] % parts:
            raise LayoutError(
                _("TP {tp} does not divide {size} rows of {name}").format(
                    tp=parts, size=shape[axis], name=parameter.name
                )
            )
        shape[axis] //= parts
    if expert and parameter.copies % sizes.expert:
        raise LayoutError(
            _("EP {ep} does not divide {experts} experts").format(ep=sizes.expert, experts=parameter.copies)
        )
    return RankTensor(
        name=parameter.name,
        shape=tuple(shape),
        copies=parameter.copies // sizes.expert if expert else parameter.copies,
        expert=expert,
        linear=len(shape) == 2 and parameter.role in (Role.LINEAR, Role.EXPERT, Role.ROUTER),
        shared_embedding=shared,
        fp32=parameter.dtype == "float32",
    )


def _merge(tensors: list[RankTensor]) -> list[RankTensor]:
    """Join what Megatron-LM holds as one tensor: q, k and v, and gate and up, weights and biases apart."""
    merged: dict[str, RankTensor] = {}
    for tensor in tensors:
        *path, module, kind = ("", *tensor.name.rsplit(".", 2))[-3:]
        fused = _FUSED.get(module)
        name = f"{path[0] if path else ''}.{fused}.{kind}" if fused else tensor.name
        before = merged.get(name)
        if before is not None and fused:
            shape = (before.shape[0] + tensor.shape[0], *tensor.shape[1:])
            merged[name] = RankTensor(
                name=name, shape=shape, copies=tensor.copies, expert=tensor.expert, linear=tensor.linear
            )
        else:
            merged[name + ("" if before is None else "'")] = tensor
    return list(merged.values())


def adapters(job: TrainingJob, tensors: list[RankTensor]) -> list[RankTensor]:
    """The trained pairs beside frozen weights: r x columns and rows x r for every linear weight on the rank.

    Formula: r * (rows + columns) of the rank's share; routers and heads have none.
    Source: arXiv:2106.09685 section 4.1.
    """
    rank = job.lora.rank if job.lora is not None else 0
    found = []
    for tensor in tensors:
        if tensor.linear and ".gate." not in tensor.name and rank:
            rows, columns = tensor.shape
            for name, shape in (("lora_a", (rank, columns)), ("lora_b", (rows, rank))):
                found.append(replace(tensor, name=f"{tensor.name}.{name}", shape=shape))
    return found


def buffer_elements(
    tensors: list[RankTensor], *, data: int, distributed: bool, bucket: int | None, granule: int = 128
) -> int:
    """Elements of a parameter or gradient buffer, padding included.

    Formula: with the distributed optimizer every parameter starts at a multiple of 64 elements and every bucket ends
        at a multiple of lcm(N, granule), N data-parallel ranks; a tied embedding is a bucket of its own. Else unpadded.
    Source: Megatron-LM@adc69db:megatron/core/distributed/param_and_grad_buffer.py:_ParamAndGradBuffer.__init__.
    """
    if not distributed or sum(tensor.copies for tensor in tensors) > MAX_TENSORS:
        return sum(tensor.num_elements for tensor in tensors)
    multiple = math.lcm(data, granule)
    at = start = 0
    for tensor, size in _single(reversed(tensors)):
        at = -(-at // 64) * 64
        if tensor.shared_embedding and at > start:
            start = at = -(-at // multiple) * multiple
        at += size
        if tensor.shared_embedding or (bucket is not None and at - start >= bucket):
            start = at = -(-at // multiple) * multiple
    return -(-at // multiple) * multiple


def _single(tensors: Iterator[RankTensor]) -> Iterator[tuple[RankTensor, int]]:
    for tensor in tensors:
        for _copy in range(tensor.copies):
            yield tensor, math.prod(tensor.shape)
