"""The verdict on what engines, libraries, the host and launchers say."""

from __future__ import annotations

from ullage.i18n import _
from ullage.observe.oom import Fact
from ullage.observe.verdict import Finding
from ullage.units import format_bytes


def judge_other(fact: Fact) -> Finding:
    """Judge a fact that is not a failed allocation of PyTorch."""
    rules = {
        "kv_pool": _kv_pool,
        "pool_full": _pool_full,
        "start_budget": _start_budget,
        "profile_moved": _profile_moved,
        "xla_oom": _xla,
        "buffer_oom": _buffer,
        "library_oom": _library,
        "host_kill": _host_kill,
        "host_oom": _host_oom,
        "killed": _killed,
        "timeout": _timeout,
        "follows": _timeout,
        "library_odd": _library_odd,
        "pressure": _pressure,
        "hint": _hint,
    }
    return rules[fact.kind](fact)


def _kv_pool(fact: Fact) -> Finding:
    needed, available = fact.size("needed"), fact.size("available")
    if needed is not None and available is not None:
        why = _("one request of full length needs {needed} of KV cache, {available} are there").format(
            needed=format_bytes(needed), available=format_bytes(available)
        )
        return Finding(cause="kv_pool", confidence="certain", why=why, gap_bytes=needed - available)
    length, tokens = fact.count("max_model_len"), fact.count("kv_cache_tokens")
    if length is not None and tokens is not None:
        why = _("the longest request has {length:,} tokens, the KV cache holds {tokens:,}").format(
            length=length, tokens=tokens
        )
        return Finding(cause="kv_pool", confidence="certain", why=why)
    if tokens is not None:
        why = _("the engine counts {tokens:,} tokens of KV cache: the weights take more than its share of the card")
        return Finding(cause="kv_pool", confidence="certain", why=why.format(tokens=tokens))
    if fact.detail("needed_fraction"):
        why = _("the weights need a static fraction above {needed}, it is {fraction}").format(
            needed=fact.detail("needed_fraction"), fraction=fact.detail("fraction")
        )
        return Finding(cause="kv_pool", confidence="certain", why=why)
    why = _("weights and the profiled peak use up the engine's share of the card: nothing is left for the KV cache")
    return Finding(cause="kv_pool", confidence="certain", why=why)


def _pool_full(fact: Fact) -> Finding:
    why = _("the running requests asked for {tokens:,} more tokens than the KV cache has").format(
        tokens=fact.count("tokens") or 0
    )
    return Finding(cause="kv_pool", confidence="likely", why=why)


def _start_budget(fact: Fact) -> Finding:
    free, capacity, asked = (fact.size(name) or 0 for name in ("free", "capacity", "requested"))
    why = _(
        "the engine wants {asked} ({fraction} of {total}), and only {free} are free: {held} are held already"
    ).format(
        asked=format_bytes(asked),
        fraction=fact.detail("utilization"),
        total=format_bytes(capacity),
        free=format_bytes(free),
        held=format_bytes(capacity - free),
    )
    return Finding(cause="start_budget", confidence="certain", why=why, gap_bytes=asked - free)


def _profile_moved(_fact: Fact) -> Finding:
    why = _("memory was given back by another process while the engine measured its own")
    return Finding(cause="other_process", confidence="likely", why=why)


def _xla(fact: Fact) -> Finding:
    requested, whole = fact.size("requested") or 0, fact.size("total")
    if whole is not None:
        why = _("the compiled program needs {total} in all, and its buffer of {asked} could not be had").format(
            total=format_bytes(whole), asked=format_bytes(requested)
        )
        if whole <= 64 << 20:
            why = _(
                "the compiled program needs {total} in all: no card is too small for that, so something else holds it"
            ).format(total=format_bytes(whole))
            return Finding(cause="other_process", confidence="unsure", why=why)
        return Finding(cause="capacity", confidence="likely", why=why)
    why = _("XLA could not have {asked}; the message does not say what the card held").format(
        asked=format_bytes(requested)
    )
    return Finding(cause="capacity", confidence="unsure", why=why)


def _buffer(fact: Fact) -> Finding:
    requested = fact.size("requested")
    roles = {"weights": _("the weights"), "compute": _("the compute graph"), "kv_cache": _("the KV cache")}
    role = roles.get(fact.detail("role"), _("a buffer"))
    if requested is None:
        why = _("{what} could not be allocated").format(what=role)
        return Finding(cause="capacity", confidence="unsure", why=why)
    why = _("{what} of {size} in one piece could not be allocated on {where}").format(
        what=role, size=format_bytes(requested), where=fact.detail("buffer") or _("the GPU")
    )
    return Finding(cause="capacity", confidence="likely", why=why)


def _library(fact: Fact) -> Finding:
    library = fact.detail("library")
    if library == "driver":
        why = _("the driver had nothing left; the message does not say who asked for how much")
        return Finding(cause="outside", confidence="unsure", why=why)
    why = _("{library} could not allocate its own memory: it lies outside PyTorch, which had taken what there was")
    return Finding(cause="outside", confidence="likely", why=why.format(library=library))


def _library_odd(fact: Fact) -> Finding:
    why = _("{library} failed without saying why; a full card is one of the usual reasons")
    return Finding(cause="outside", confidence="unsure", why=why.format(library=fact.detail("library")))


def _pressure(_fact: Fact) -> Finding:
    why = _(
        "PyTorch had to empty its cache to go on: the job runs at the edge of the card, and no death is in the text"
    )
    return Finding(cause="capacity", confidence="unsure", why=why)


def _host_kill(fact: Fact) -> Finding:
    resident = fact.size("anonymous")
    name = fact.detail("process") or _("a process")
    if resident is not None:
        why = _("the kernel killed {name} for the host's memory; it held {size} of it").format(
            name=name, size=format_bytes(resident)
        )
    else:
        why = _("{name} was killed for the host's memory, not the GPU's").format(name=name)
    return Finding(cause="host", confidence="certain", why=why)


def _host_oom(fact: Fact) -> Finding:
    requested, free = fact.size("requested"), fact.size("free")
    if fact.detail("scope") == "shared memory":
        why = _("the shared memory (/dev/shm) of the data loader is full")
    elif requested is not None and free is not None:
        why = _("{asked} of host memory are needed, {free} are free").format(
            asked=format_bytes(requested), free=format_bytes(free)
        )
    elif requested is not None:
        why = _("{asked} of host memory could not be had").format(asked=format_bytes(requested))
    else:
        why = _("host memory could not be had")
    gap = None if requested is None or free is None else requested - free
    return Finding(cause="host", confidence="certain", why=why, gap_bytes=gap)


def _killed(_fact: Fact) -> Finding:
    why = _(
        "a process was killed by SIGKILL (137): most often the host's memory, and a launcher or person can do it too"
    )
    return Finding(cause="host", confidence="unsure", why=why)


def _timeout(fact: Fact) -> Finding:
    if fact.kind == "follows":
        why = _("this process says that another one failed; why is not in the text, and it need not be memory")
        return Finding(cause="cascade", confidence="unsure", why=why)
    why = _(
        "ranks waited in a collective for one that did not come: look for the death or the delay on that other rank"
    )
    return Finding(cause="cascade", confidence="likely", why=why)


def _hint(fact: Fact) -> Finding:
    if fact.framework == "sglang":
        why = _("the KV cache filled up and requests were put back: slow, not dead")
        return Finding(cause="kv_pool", confidence="likely", why=why)
    why = _(
        "the engine was about to capture CUDA graphs, which lie outside its share; the death itself is not in the text"
    )
    return Finding(cause="outside", confidence="unsure", why=why)
