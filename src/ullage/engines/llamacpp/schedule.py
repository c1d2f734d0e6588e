"""A ggml compute graph, its splits over backends, and the size of each backend's compute buffer.

The engine builds its worst-case graph once, cuts it where the backend changes, adds a copy of every tensor that
crosses a cut, and lays all results out with a first-lifetime, best-fit allocator. This module does the same with
sizes alone, so that the compute buffer is derived rather than guessed.

Source: ik_llama.cpp@58f08e43:ggml/src/ggml-backend.c:ggml_backend_sched_split_graph;
    ggml/src/ggml-alloc.c:ggml_gallocr_alloc_graph_impl, ggml_dyn_tallocr_alloc, ggml_dyn_tallocr_free_tensor
    (llama.cpp has the same code under ggml/src/ggml-backend.cpp and ggml-alloc.c).
Known error: operator fusion and padding of kernels are not seen; a graph that differs by one live tensor differs by
that tensor.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ullage.units import round_up

#: backend number of the host; devices are 0, 1, ...
HOST = -1
ALIGNMENT = 128


@dataclass(eq=False, slots=True)
class Node:
    """One tensor of the graph.

    Attributes:
        name: for people who debug.
        size: bytes; ``external`` tensors (weights, caches) take none of the compute buffer.
        sources: the tensors it is computed from.
        viewed: the tensor whose memory it shows, None for a tensor of its own.
        can_inplace: the operation may overwrite a source of equal size that nobody else needs.
        backend: where it is computed.
        is_input: set by the user before each run: allocated first.
        is_output: never freed.
        offloaded: starts a split of its own, because a host weight is copied for it.
    """

    name: str
    size: int
    sources: tuple[Node, ...] = ()
    viewed: Node | None = None
    can_inplace: bool = False
    backend: int = HOST
    is_input: bool = False
    is_output: bool = False
    external: bool = False
    offloaded: bool = False


@dataclass(slots=True)
class Graph:
    """Nodes in the order in which the engine computes them: depth first at each :meth:`expand`."""

    order: list[Node] = field(default_factory=list)
    _seen: set[int] = field(default_factory=set)

    def expand(self, node: Node) -> Node:
        """Append ``node`` after everything that it needs and that is not there yet."""
        stack: list[tuple[Node, int]] = [(node, 0)]
        while stack:
            current, at = stack.pop()
            if at == 0:
                if id(current) in self._seen:
                    continue
                self._seen.add(id(current))
            if at < len(current.sources):
                stack.append((current, at + 1))
                stack.append((current.sources[at], 0))
            else:
                self.order.append(current)
        return node


def buffer_sizes(graph: Graph, num_copies: int = 1) -> dict[int, int]:
    """Return the bytes of the compute buffer of each backend.

    Args:
        graph: the worst-case graph.
        num_copies: copies of every tensor that crosses a cut (4 with pipeline parallelism), kept for the whole run.
    """
    return _Allocation().run(_with_copies(graph, num_copies), num_copies)


def _with_copies(graph: Graph, num_copies: int) -> list[Node]:
    """Return the graph with a copy of each tensor that crosses a cut, allocated where the split starts."""
    nodes = [node for node in graph.order if not node.external and not node.is_input]
    listed: list[Node] = []
    copies: dict[tuple[int, int], Node] = {}
    start = 0
    while start < len(nodes):
        end = start + 1
        while end < len(nodes) and nodes[end].backend == nodes[start].backend and not nodes[end].offloaded:
            end += 1
        split, backend = nodes[start:end], nodes[start].backend
        for node in split:
            for source in node.sources:
                if _lives_elsewhere(source, backend) and (id(source), backend) not in copies:
                    keep = Node(name="keep", size=0, sources=(source,), external=True, backend=source.backend)
                    copy = Node(name=f"copy of {source.name}", size=source.size, backend=backend)
                    copy.is_input = copy.is_output = num_copies > 1
                    copy.size = round_up(copy.size, ALIGNMENT) * num_copies
                    copies[id(source), backend] = copy
                    listed += (keep, copy)
        for node in split:
            if any((id(source), backend) in copies for source in node.sources):
                node.sources = tuple(copies.get((id(source), backend), source) for source in node.sources)
            listed.append(node)
        start = end
    return listed


def _lives_elsewhere(source: Node, backend: int) -> bool:
    if source.external and source.backend != HOST:
        return False
    return source.backend != backend and source.size > 0 and not (source.external and source.name == "cache")


class _Allocation:
    """The graph allocator: one free list per backend, one state per tensor."""

    def __init__(self) -> None:
        self.free: dict[int, list[list[int]]] = {}
        self.peak: dict[int, int] = {}
        self.children: dict[int, int] = {}
        self.views: dict[int, int] = {}
        self.offset: dict[int, int] = {}
        self.allocated: set[int] = set()

    def run(self, nodes: list[Node], num_copies: int) -> dict[int, int]:
        """Allocate and free in the engine's order; return the peak per backend."""
        for node in nodes:
            if node.is_input:
                self.place(node)
            if node.viewed is not None:
                self.views[id(node.viewed)] = self.views.get(id(node.viewed), 0) + 1
            for source in node.sources:
                self.children[id(source)] = self.children.get(id(source), 0) + 1
                if source.is_input:
                    if num_copies > 1 and not source.is_output and not source.external:
                        source.size, source.is_output = round_up(source.size, ALIGNMENT) * num_copies, True
                    self.place(source)
        for node in nodes:
            self.place(node)
            for source in node.sources:
                self.release_child(source)
        return self.peak

    def release_child(self, node: Node) -> None:
        """Note that one user of ``node`` is done; free what nobody needs any more."""
        self.children[id(node)] -= 1
        if self.children[id(node)] or self.views.get(id(node), 0):
            return
        if node.viewed is not None:
            root = node.viewed
            self.views[id(root)] -= 1
            if not self.views[id(root)] and not self.children.get(id(root), 0):
                self.release(root)
        else:
            self.release(node)

    def place(self, node: Node) -> None:
        """Give ``node`` memory: a source's, if it may overwrite it, else a piece of the free list."""
        if node.external or node.viewed is not None or id(node) in self.allocated:
            return
        self.allocated.add(id(node))
        if node.can_inplace:
            for parent in node.sources:
                owner = self.reusable(parent, node)
                if owner is not None:
                    self.allocated.discard(id(owner))
                    self.offset[id(node)] = self.offset[id(owner)]
                    return
        self.offset[id(node)] = self.take(node.backend, round_up(node.size, ALIGNMENT))

    def reusable(self, parent: Node, node: Node) -> Node | None:
        """Return the tensor whose memory ``node`` may take over from ``parent``, if any."""
        owner = parent.viewed or parent
        if owner.external or owner.is_output or owner.backend != node.backend or parent.size != node.size:
            return None
        if id(owner) not in self.allocated or self.children.get(id(parent), 0) != 1 or self.views.get(id(parent), 0):
            return None
        if parent.viewed is not None and (self.views[id(owner)] != 1 or self.children.get(id(owner), 0)):
            return None
        return owner

    def take(self, backend: int, size: int) -> int:
        """Best fit among the holes; the open end of the buffer is the last resort."""
        holes = self.free.setdefault(backend, [[0, 1 << 62]])
        best = len(holes) - 1
        for index in range(len(holes) - 1):
            if holes[index][1] >= size and (best == len(holes) - 1 or holes[index][1] <= holes[best][1]):
                best = index
        offset = holes[best][0]
        holes[best][0] += size
        holes[best][1] -= size
        if not holes[best][1]:
            del holes[best]
        self.peak[backend] = max(self.peak.get(backend, 0), offset + size)
        return offset

    def release(self, node: Node) -> None:
        """Give the memory of ``node`` back and join it with its neighbours."""
        if node.external or node.is_output or id(node) not in self.allocated:
            return
        self.allocated.discard(id(node))
        start, size = self.offset[id(node)], round_up(node.size, ALIGNMENT)
        holes = self.free[node.backend]
        index = 0
        while index < len(holes) and holes[index][0] < start:
            index += 1
        holes.insert(index, [start, size])
        if index + 1 < len(holes) and holes[index][0] + holes[index][1] == holes[index + 1][0]:
            holes[index][1] += holes.pop(index + 1)[1]
        if index > 0 and holes[index - 1][0] + holes[index - 1][1] == holes[index][0]:
            holes[index - 1][1] += holes.pop(index)[1]
