"""What a step takes and frees, in order, a free as a negative number: of real memory on the CPU, and of a trace."""

from torch.profiler import ProfilerActivity, profile


def real_sizes(step):
    """Run a step; return the bytes of its allocations and frees."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step()
    events, todo = [], list(found.profiler.kineto_results.experimental_event_tree())
    while todo:
        node = todo.pop()
        if node.tag.name == "Allocation":
            events.append((node.start_time_ns, node.extra_fields.alloc_size))
        todo.extend(node.children)
    return [size for _time, size in sorted(events)]


def traced_sizes(found, step):
    """Return what a traced step takes and frees, as the profiler writes it: without what only a GPU has."""
    sizes = []
    for index, event in enumerate(found.trace.events):
        one, place = found.trace.allocations[event if event >= 0 else ~event], found.trace.place(index)
        if place.step == step and place.phase in ("forward", "backward") and one.category not in ("workspace", "input"):
            sizes.append(one.size_bytes if event >= 0 else -one.size_bytes)
    return sizes


def from_first(sizes):
    """Drop the frees that a step begins with: gradients of the one before."""
    return sizes[next(index for index, size in enumerate(sizes) if size > 0) :]


def without_scratch(sizes, least=4096):
    """Drop what an operator takes and gives back at once, and what is small."""
    kept = []
    for size in (each for each in sizes if abs(each) >= least):
        if kept and size < 0 and kept[-1] == -size:
            kept.pop()
        else:
            kept.append(size)
    return kept
