"""The figures of a start as terms, and the rest that they leave unexplained.

Formula:
    vLLM: share = total x gpu_memory_utilization = weights + non_torch + activation_peak + kv_cache + rest
    SGLang: free before loading = weights + kv_cache + cuda_graphs + free at the end + rest
    llama.cpp: a card's buffers; the log does not print what the card has
Source: docs/engines; vllm@0.33.0:vllm/v1/worker/gpu_worker.py:determine_available_memory.
"""

from __future__ import annotations

from ullage.i18n import _
from ullage.ledger import Certainty, Term, ranged
from ullage.observe.engine_logs import Collected, Figure
from ullage.units import format_bytes

_PARTS = {
    "vllm": ("weights", "non_torch", "activation_peak", "cuda_graph_estimate", "kv_cache"),
    "sglang": ("weights", "kv_cache", "cuda_graphs"),
}
_BESIDE = {"vllm": ("cuda_graphs",)}


def engine_terms(collected: Collected) -> tuple[tuple[Term, ...], str]:
    """Return the terms of the fullest place, and a sentence on what they leave open (empty when nothing is)."""
    figures, engine = collected.fullest(), collected.engine()
    names = _PARTS.get(engine, ("weights", "kv_cache", "activation_peak"))
    terms = [_term(figures[name]) for name in (*names, *_BESIDE.get(engine, ())) if _has(figures, name)]
    if not terms:
        return (), ""
    total = _whole(figures, collected, engine)
    if total is None:
        sentences = {
            "vllm": share_unknown(),
            "sglang": _("the log does not print what was free before loading, so the rest is not known"),
        }
        return tuple(terms), sentences.get(engine, _("the log does not print the card's memory: the rest is not known"))
    inside = [term for term in terms if term.name in names]
    ends = 0 if engine == "vllm" else _end(figures)
    if engine == "sglang" and not ends:
        return tuple(terms), _("the log does not print what was free at the end, so the rest is not known")
    if ends:
        terms.append(_plain("free_at_end", ends, "available_gpu_mem"))
    if "kv_cache" not in {term.name for term in inside}:
        return tuple(terms), _("the log does not print the KV cache, so the rest is not known")
    rest = total - sum(term.bytes for term in inside) - ends
    terms.append(_plain("unexplained", rest, _("{total} less the terms").format(total=format_bytes(total))))
    return tuple(terms), ""


def share_unknown() -> str:
    """Return the sentence on a log that does not print the engine's share."""
    return _("the log does not print the engine's share of the card, so the rest is not known")


def rest_of_share(terms: tuple[Term, ...], share: Term) -> Term | None:
    """Return what vLLM's terms leave of its share of the card, where a job says how much that is.

    Formula: share - (weights + non_torch + activation_peak + kv_cache); CUDA graphs lie beside the share.
    """
    inside = [term for term in terms if term.name in _PARTS["vllm"]]
    if not {"weights", "kv_cache"} <= {term.name for term in inside}:
        return None
    if any(term.name == "unexplained" for term in terms):
        return None
    return ranged(
        "unexplained",
        share.bytes - sum(term.bytes for term in inside),
        low=share.low_bytes - sum(term.high_bytes for term in inside),
        high=share.high_bytes - sum(term.low_bytes for term in inside),
        formula=_("{total}, the job's share of the card, less the terms").format(total=format_bytes(share.bytes)),
        certainty=Certainty.MEASURED,
    )


def figures_sentence(collected: Collected) -> str:
    """Return what a start had for its KV cache in one sentence, empty when the log does not say."""
    figures = collected.fullest()
    share = _whole(figures, collected, collected.engine())
    if share is None or not _has(figures, "weights"):
        return ""
    weights = figures["weights"].size
    assert weights is not None
    return _("{weights} of weights go into a share of {share}").format(
        weights=format_bytes(weights.bytes), share=format_bytes(share)
    )


def _has(figures: dict[str, Figure], name: str) -> bool:
    return name in figures and figures[name].size is not None


def _amount(figures: dict[str, Figure], name: str) -> int | None:
    figure = figures.get(name)
    return figure.size.bytes if figure is not None and figure.size is not None else None


def _whole(figures: dict[str, Figure], collected: Collected, engine: str) -> int | None:
    """Return what the engine may take, as its log says."""
    if engine == "sglang":
        return _amount(figures, "available_before_weights")
    if engine != "vllm":
        return None
    requested, total = _amount(figures, "requested"), _amount(figures, "total")
    if requested is not None:
        return requested
    fraction = collected.settings.get("gpu_memory_utilization")
    return None if total is None or fraction is None else int(total * float(fraction))


def _end(figures: dict[str, Figure]) -> int:
    end = _amount(figures, "available_at_end")
    if end is not None:
        return end
    return max(0, (_amount(figures, "available_after_pool") or 0) - (_amount(figures, "cuda_graphs") or 0))


def _term(figure: Figure) -> Term:
    assert figure.size is not None
    size = figure.size
    return ranged(
        figure.quantity,
        size.bytes,
        low=size.bytes - size.half_step_bytes,
        high=size.bytes + size.half_step_bytes,
        formula=size.text,
        source=f"{figure.engine} log, line {figure.line}",
        certainty=Certainty.MEASURED,
    )


def _plain(name: str, num_bytes: int, formula: str) -> Term:
    return ranged(name, num_bytes, low=num_bytes, high=num_bytes, formula=formula, certainty=Certainty.MEASURED)
