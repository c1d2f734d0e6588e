"""Helpers that make graph nodes as the engines' graph builders do."""

from __future__ import annotations

from dataclasses import dataclass, field

from ullage.engines.llamacpp.schedule import HOST, Graph, Node
from ullage.frozen import Frozen

F32, F16 = 4, 2


class GraphSettings(Frozen):
    """What shapes the graph.

    Attributes:
        num_tokens: of one micro batch; num_outputs: rows of logits (equal in the worst case).
        num_kv: cells of the cache; window_kv: cells of the sliding-window cache, 0 when it is as large as the other.
        latent_mode: ik_llama.cpp's ``-mla``; 0 for the expanded cache; mainline's absorbed form is 4.
        attention_max_mib: ``-amb``, 0 for no limit.
        cache_bytes_per_value: of the key cache, for the casts that quantised latents need.
        host_only: no device: expanded latents keep the cache's type.
        ik: ik_llama.cpp's fused norms and products.
        mask_f16: the mask needs no cast; groups_one_by_one: head groups are used as soon as they are expanded.
        fused_glu: mainline since mid-2025 multiplies gate and up in one step of its own.
    """

    num_tokens: int
    num_outputs: int
    num_kv: int
    window_kv: int = 0
    flash_attention: bool = True
    latent_mode: int = 0
    attention_max_mib: int = 0
    cache_bytes_per_value: float = 2.0
    host_only: bool = False
    fused_moe: bool = False
    ik: bool = False
    fused_glu: bool = False
    mask_padding: int = 64
    mask_f16: bool = False
    groups_one_by_one: bool = False


@dataclass(slots=True)
class Builder:
    """Makes nodes on the current backend."""

    settings: GraphSettings
    graph: Graph = field(default_factory=Graph)
    backend: int = HOST
    cache: Node = field(default_factory=lambda: Node(name="cache", size=0, external=True))
    positions: Node = field(default_factory=lambda: Node(name="none", size=0, external=True))
    casts: dict[int, Node] = field(default_factory=dict)
    weights: dict[str, int] = field(default_factory=dict)
    host_cache: tuple[Node, ...] = ()

    def enter(self, backend: int, weights: dict[str, int], cache_bytes: tuple[int, int]) -> None:
        """Go on with a layer on ``backend``, with the host matrices and the host cache that it copies over."""
        self.backend, self.weights = backend, weights
        self.host_cache = tuple(
            Node(name="host cache", size=size, external=True, backend=HOST) for size in cache_bytes if size
        )

    def weight(self, role: str) -> tuple[Node, ...]:
        """The matrix of ``role`` when it is copied from the host, else nothing."""
        size = self.weights.get(role, 0)
        return (Node(name="host weight", size=size, external=True, backend=HOST),) if size else ()

    def cached(self) -> tuple[Node, ...]:
        """Keys and values to read: on the layer's own device, or copies from the host."""
        return self.host_cache or (self.cache,)

    def input(self, name: str, size: int) -> Node:
        """A tensor that the user fills before each step; it lives on the host."""
        return Node(name=name, size=size, is_input=True, backend=HOST)

    def op(self, name: str, size: int, *sources: Node, inplace: bool = False, backend: int | None = None) -> Node:
        """A computed tensor of ``size`` bytes."""
        return Node(
            name=name,
            size=size,
            sources=sources,
            can_inplace=inplace,
            backend=self.backend if backend is None else backend,
            offloaded=any(source.external and source.name == "host weight" for source in sources),
        )

    def view(self, node: Node, size: int | None = None, *, strided: bool = False) -> Node:
        """Another shape of the same memory. A ``strided`` view cannot be overwritten by a dense result."""
        return Node(
            name=node.name,
            size=(node.size if size is None else size) + (1 if strided else 0),
            sources=(node,),
            viewed=node.viewed or node,
            backend=node.backend,
        )

    def norm(self, node: Node, size: int) -> Node:
        """A norm with its weight: one new tensor, or in mainline two steps of which the second is in place."""
        if self.settings.ik:
            return self.op("norm", size, node)
        return self.op("norm weight", size, self.op("norm", size, node, inplace=True), inplace=True)

    def product(self, gate: Node, up: Node, backend: int | None = None) -> Node:
        """activation(gate) x up: fused into a new tensor, or both steps in place of the gate."""
        if self.settings.ik or self.settings.fused_glu:
            return self.op("gated", gate.size, gate, up, backend=backend)
        activated = self.op("activation", gate.size, gate, inplace=True, backend=backend)
        return self.op("gated", gate.size, activated, up, inplace=True, backend=backend)

    def halves_product(self, both: Node, backend: int | None = None) -> Node:
        """The same for gate and up in one tensor: old mainline copies the halves out first."""
        half = both.size // 2
        if self.settings.ik or self.settings.fused_glu:
            return self.op("gated", half, both, backend=backend)
        gate = self.op("gate half", half, self.view(both, half), backend=backend)
        up = self.op("up half", half, self.view(both, half), backend=backend)
        return self.product(gate, up, backend)

    def store(self, node: Node) -> None:
        """Write into the cache: the result is a view of it."""
        write = Node(name="store", size=0, sources=(node,), viewed=self.cache, backend=self.backend)
        self.graph.expand(write)
