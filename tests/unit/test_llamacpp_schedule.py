"""The graph allocator: lifetimes, holes, takeovers and copies, on graphs small enough to lay out by hand."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ullage.engines.llamacpp.schedule import ALIGNMENT, HOST, Graph, Node, buffer_sizes

K = 1024


def _node(name: str, size: int, *sources: Node, **more: object) -> Node:
    return Node(name=name, size=size, sources=sources, backend=0, **more)  # type: ignore[arg-type]


def test_a_chain_needs_two_neighbours_at_a_time() -> None:
    first = _node("a", 4 * K)
    second = _node("b", 2 * K, first)
    third = _node("c", 4 * K, second)
    graph = Graph()
    graph.expand(third)
    # a at 0, b behind it, then c fits into a's hole
    assert buffer_sizes(graph) == {0: 6 * K}


def test_an_operation_in_place_takes_its_source_over() -> None:
    first = _node("a", 4 * K)
    graph = Graph()
    graph.expand(_node("b", 4 * K, first, can_inplace=True))
    assert buffer_sizes(graph) == {0: 4 * K}


def test_a_source_with_another_user_is_not_overwritten() -> None:
    first = _node("a", 4 * K)
    second = _node("b", 4 * K, first, can_inplace=True)
    graph = Graph()
    graph.expand(_node("c", 1 * K, second, first))
    assert buffer_sizes(graph) == {0: 9 * K}


def test_an_output_is_never_freed() -> None:
    kept = _node("kept", 4 * K, is_output=True)
    graph = Graph()
    graph.expand(_node("b", 4 * K, _node("a", 4 * K, kept)))
    assert buffer_sizes(graph) == {0: 12 * K}


def test_what_crosses_a_cut_is_copied_once_and_with_copies_kept() -> None:
    def graph() -> Graph:
        made = Graph()
        source = Node(name="x", size=K, backend=HOST)
        left = Node(name="l", size=K, sources=(source,), backend=0)
        made.expand(Node(name="r", size=K, sources=(left, source), backend=0))
        return made

    # the host holds x; the device a copy of it, l and r
    assert buffer_sizes(graph()) == {HOST: K, 0: 3 * K}
    assert buffer_sizes(graph(), 4) == {HOST: K, 0: 6 * K}


def test_a_host_weight_of_a_large_batch_is_copied_to_the_device() -> None:
    weight = Node(name="host weight", size=64 * K, external=True, backend=HOST)
    graph = Graph()
    graph.expand(Node(name="y", size=K, sources=(weight, _node("x", K)), backend=0, offloaded=True))
    assert buffer_sizes(graph) == {0: 66 * K}


@given(st.lists(st.tuples(st.integers(1, 10_000), st.integers(0, 3), st.booleans()), min_size=1, max_size=40))
def test_the_buffer_lies_between_the_largest_tensor_and_the_sum(shapes: list[tuple[int, int, bool]]) -> None:
    made: list[Node] = []
    for size, back, inplace in shapes:
        sources = tuple(made[-back:]) if back else ()
        made.append(_node("n", size, *sources, can_inplace=inplace))
    graph = Graph()
    for node in made:
        graph.expand(node)
    padded = [-(-size // ALIGNMENT) * ALIGNMENT for size, _back, _inplace in shapes]
    assert max(padded) <= buffer_sizes(graph)[0] <= sum(padded)
