"""Groups of the KV cache: layers that share a block table, and what one block of the pool costs.

Uniform models have one group. Hybrids (sliding windows or state layers beside full attention) are split into groups of
equal width, so that every block of the pool costs the same; a group that is not full is padded.
"""

from __future__ import annotations

from dataclasses import replace

from ullage.engines.vllm.defaults import Setup
from ullage.engines.vllm.specs import CacheSpec, in_flight_tokens, layer_specs
from ullage.frozen import Frozen
from ullage.units import cdiv

LayerSpec = tuple[int, CacheSpec]


class Group(Frozen):
    """Layers with one block table; ``spec`` stands for the blocks a request takes."""

    layers: tuple[LayerSpec, ...]
    spec: CacheSpec

    def bytes_of(self, first: int, end: int) -> int:
        """Bytes of a block over the layers of a pipeline stage; drafts (beyond the last layer) go to the last stage."""
        return sum(one.page_bytes for index, one in self.layers if first <= index < end)


class Grouping(Frozen):
    """All groups of a model and the rules for counting with them."""

    groups: tuple[Group, ...]
    width: int  # layers of a padded group, 0 where groups are not padded
    page_bytes: int
    in_flight: int
    dcp: int
    num_layers: int
    packed: int = 0  # bytes of a block where pages of several sizes are packed side by side

    def block_bytes(self, first: int, end: int) -> int:
        """Return the bytes of one block of the pool on a stage that holds layers ``first``..``end``.

        Formula: one group: the sum of its pages; several: the widest group, padded.
        Source: vllm@0.33.0:vllm/v1/core/kv_cache_planning.py:_get_kv_cache_bytes_per_block;
            vllm@0.11.0:vllm/v1/core/kv_cache_utils.py:get_kv_cache_config.
        """
        stop = 1 << 30 if end == self.num_layers else end
        whole = first == 0 and end == self.num_layers
        if whole and self.packed:
            return self.packed
        if whole and self.width:
            return self.width * self.page_bytes
        return max((group.bytes_of(first, stop) for group in self.groups), default=0)

    def request_blocks(self, length: int) -> int:
        """Return the blocks that one request of ``length`` tokens takes from the pool, over all groups."""
        return sum(group.spec.pages(length, in_flight=self.in_flight, dcp=self.dcp) for group in self.groups)

    def log_blocks(self, length: int, *, by_first_page: bool) -> int:
        """Return the blocks of a request as the log's concurrency counts them.

        Formula: ``by_first_page``: ceil(sum over groups of pages x group page / page of the first group), which counts
            a narrow group for less than a block; else :meth:`request_blocks`. Equal where all pages are.
        Source: vllm@0.23.0:vllm/v1/core/kv_cache_utils.py:get_max_concurrency_for_kv_cache_config; 0.27.0: per group.
        """
        if not by_first_page or not self.packed or not self.groups:
            return self.request_blocks(length)
        sizes = sorted({one.page_bytes for _index, one in self.groups[0].layers})
        first = sum(one.page_bytes for _index, one in self.groups[0].layers)
        needed = sum(
            group.spec.pages(length, in_flight=self.in_flight, dcp=self.dcp)
            * sum(next((size for size in sizes if size >= one.page_bytes), sizes[-1]) for _index, one in group.layers)
            for group in self.groups
        )
        return cdiv(needed, first)

    @property
    def block_tokens(self) -> int:
        """Tokens of the smallest block."""
        return min((group.spec.block_tokens for group in self.groups), default=1)


def _promoted(specs: list[LayerSpec]) -> list[LayerSpec]:
    """Give local layers the blocks of full attention: versions and jobs without the hybrid manager."""
    if any(one.kind in ("full", "latent") for _index, one in specs):
        return [
            (i, replace(one, kind="full", window=0) if one.kind in ("window", "chunk") else one) for i, one in specs
        ]
    return specs


def _one_group(specs: list[LayerSpec]) -> list[Group] | None:
    """Return the single group of a uniform model, or None: one kind, one block size, one window."""
    shapes = {(one.kind, one.block_tokens, one.window, one.states) for _index, one in specs}
    if len(shapes) != 1:
        return None
    return [Group(layers=tuple(specs), spec=specs[0][1])]


def _unified(specs: list[LayerSpec]) -> list[LayerSpec]:
    """Make all pages equal: smaller attention pages take more tokens where that divides, else they are padded.

    Source: vllm@0.33.0:vllm/v1/core/kv_cache_planning.py:unify_kv_cache_spec_page_size.
    """
    largest = max(one.page_bytes for _index, one in specs)
    found = []
    for index, one in specs:
        if one.page_bytes != largest and one.kind != "state" and largest % one.page_bytes == 0:
            one = replace(one, block_tokens=one.block_tokens * (largest // one.page_bytes), page_bytes=largest)
        elif one.page_bytes != largest:
            one = replace(one, page_bytes=largest)
        found.append((index, one))
    return found


def _equal_groups(specs: list[LayerSpec], slack: float) -> tuple[list[Group], int]:
    """Split kinds into groups of equal width.

    Formula: width = the smallest kind's layers, or the largest's if that is within ``slack`` of it; each kind makes
        ceil(layers / width) groups, dealt round-robin.
    Source: vllm@0.33.0:vllm/v1/core/kv_cache_planning.py:_get_kv_cache_groups_uniform_page_size.
    """
    buckets: dict[CacheSpec, list[LayerSpec]] = {}
    for index, one in specs:
        buckets.setdefault(one, []).append((index, one))
    fewest, most = min(map(len, buckets.values())), max(map(len, buckets.values()))
    width = most if most < fewest * slack else fewest
    groups = []
    for one, layers in buckets.items():
        count = cdiv(len(layers), width)
        groups += [Group(layers=tuple(layers[first::count]), spec=one) for first in range(count)]
    return groups, width


def _v4_groups(specs: list[LayerSpec], side_by_side: bool) -> tuple[list[Group], int]:
    """Group V4's caches: all growing caches in one group, each kind of ring in groups as wide as that one.

    The pool's block is what the growing group takes; rings are split so that they fit into it.
    Source: vllm@0.33.0:vllm/v1/core/kv_cache_planning.py:_get_packed_kv_cache_groups;
        vllm@0.25.0:vllm/v1/core/kv_cache_utils.py:_get_kv_cache_groups_uniform_groups.
    """
    growing = [(index, one) for index, one in specs if one.kind == "latent"]
    rings: dict[tuple[int, int], list[LayerSpec]] = {}
    for index, one in specs:
        if one.kind != "latent":
            rings.setdefault((one.window, one.block_tokens), []).append((index, one))
    counts: dict[int, int] = {}
    for _index, one in growing:
        counts[one.page_bytes] = counts.get(one.page_bytes, 0) + 1
    groups = [Group(layers=tuple(growing), spec=growing[0][1])] if growing else []
    floor = max(counts.values(), default=1)
    repeats = {key: max(_per_size(layers).values()) for key, layers in rings.items()}
    width = _least_padding([floor, *repeats.values()], floor)
    for key, layers in rings.items():
        number = cdiv(repeats[key], width)
        by_size: dict[int, list[LayerSpec]] = {}
        for item in layers:
            by_size.setdefault(item[1].page_bytes, []).append(item)
        for first in range(number):
            part = tuple(item for same in by_size.values() for item in same[first::number])
            groups.append(Group(layers=part, spec=part[0][1]))
    return groups, _packed_bytes(groups, sorted(counts), side_by_side)


def _packed_bytes(groups: list[Group], pages: list[int], side_by_side: bool) -> int:
    """Return the bytes of a block of V4's pool.

    Formula: side by side (0.29 on): the widest group. Before: for each page size of the growing group, that size x
        the most layers of it in any group, a ring's page counting as the next larger size.
    Source: vllm@0.33.0:vllm/v1/core/kv_cache_planning.py:_get_kv_cache_bytes_per_block;
        vllm@0.25.0:vllm/v1/core/kv_cache_utils.py:_get_kv_cache_config_packed, _bucket_layers_by_page_size.
    """
    if side_by_side:
        return max(sum(one.page_bytes for _index, one in group.layers) for group in groups)
    slots = dict.fromkeys(pages, 0)
    for group in groups:
        here = dict.fromkeys(pages, 0)
        for _index, one in group.layers:
            here[next((page for page in pages if page >= one.page_bytes), pages[-1])] += 1
        slots = {page: max(slots[page], here[page]) for page in pages}
    return sum(page * number for page, number in slots.items())


def _per_size(layers: list[LayerSpec]) -> dict[int, int]:
    counts: dict[int, int] = {}
    for _index, one in layers:
        counts[one.page_bytes] = counts.get(one.page_bytes, 0) + 1
    return counts


def _least_padding(values: list[int], floor: int) -> int:
    """Return the width from ``floor`` on that pads least; ties take the wider.

    Source: vllm@0.33.0:vllm/v1/core/kv_cache_planning.py:_approximate_gcd.
    """
    return min(range(floor, max(values) + 1), key=lambda width: (sum(-value % width for value in values), -width))


def grouping(setup: Setup) -> Grouping:
    """Return the groups of the whole model.

    Raises:
        LayoutError: heads that do not divide over the ranks.
    """
    specs = list(layer_specs(setup))
    hybrid = bool(setup.version.setting("hybrid_manager")) and not setup.truth("disable_hybrid_kv_cache_manager", False)
    if setup.version.engine == "V0":
        hybrid = False
    common = {
        "in_flight": in_flight_tokens(setup),
        "dcp": setup.job.parallel.decode_context_parallel_size,
        "num_layers": len(setup.job.model.layers),
    }
    if not hybrid:
        specs = _promoted(specs)
    if not specs:
        return Grouping(groups=(), width=0, page_bytes=0, **common)
    if any(one.v4 for _index, one in specs):
        groups, packed = _v4_groups(specs, setup.version.setting("packed_groups") == "packed")
        return Grouping(groups=tuple(groups), width=0, page_bytes=0, packed=packed, **common)
    single = _one_group(specs)
    if single is not None:
        return Grouping(groups=tuple(single), width=0, page_bytes=specs[0][1].page_bytes, **common)
    specs = _unified(specs)
    groups, width = _equal_groups(specs, float(setup.version.setting("group_size_slack")))
    return Grouping(groups=tuple(groups), width=width, page_bytes=specs[0][1].page_bytes, **common)
