"""The next smaller setting of a serving engine, in its own flags.

Directions matter. Memory that is short *outside* the engine's share (a forward pass, a graph capture, a library) wants
a smaller share; a KV cache that is too small *inside* it wants a larger one, or a shorter longest request. A share that
failed one way is a bound for the other way, so that two failures never chase each other.

Source: vllm@0.33.0:vllm/v1/worker/gpu_worker.py:determine_available_memory (it profiles before the share is cut),
vllm/v1/core/kv_cache_utils.py:_check_enough_kv_cache_memory; sglang@0.5.23:srt/model_executor/model_runner.py,
srt/mem_cache/kv_cache_configurator.py; llama.cpp:ggml/src/ggml-alloc.c:ggml_gallocr_reserve.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ullage.guard.plan import Plan
from ullage.guard.run.deaths import Death
from ullage.guard.run.words import Words
from ullage.i18n import _

HIGHEST_SHARE, LOWEST_SHARE, SHARE_STEP = 0.95, 0.3, 0.05
HIGHEST_STATIC = 0.98
LEAST_BATCHED_TOKENS, LEAST_SEQS, LEAST_GRAPH_BATCH, LEAST_UBATCH, LEAST_CONTEXT = 1024, 8, 1, 64, 1024


@dataclass(frozen=True, kw_only=True)
class Flag:
    """A knob as an engine spells it: all spellings, and the one that is added."""

    names: tuple[str, ...]
    flag: str
    switch: bool = False


FLAGS: dict[str, dict[str, Flag]] = {
    "vllm": {
        "gpu_memory_utilization": Flag(names=("gpu_memory_utilization",), flag="--gpu-memory-utilization"),
        "max_model_len": Flag(names=("max_model_len",), flag="--max-model-len"),
        "max_num_batched_tokens": Flag(names=("max_num_batched_tokens",), flag="--max-num-batched-tokens"),
        "max_num_seqs": Flag(names=("max_num_seqs",), flag="--max-num-seqs"),
        "enforce_eager": Flag(names=("enforce_eager",), flag="--enforce-eager", switch=True),
        "kv_cache_dtype": Flag(names=("kv_cache_dtype",), flag="--kv-cache-dtype"),
    },
    "sglang": {
        "mem_fraction_static": Flag(names=("mem_fraction_static",), flag="--mem-fraction-static"),
        "chunked_prefill_size": Flag(names=("chunked_prefill_size",), flag="--chunked-prefill-size"),
        "cuda_graph_max_bs": Flag(names=("cuda_graph_max_bs",), flag="--cuda-graph-max-bs"),
        "max_running_requests": Flag(names=("max_running_requests",), flag="--max-running-requests"),
        "max_model_len": Flag(names=("context_length",), flag="--context-length"),
    },
    "llamacpp": {
        "ubatch_size": Flag(names=("-ub", "ubatch_size"), flag="-ub"),
        "max_model_len": Flag(names=("-c", "ctx_size"), flag="-c"),
        "cache_type_k": Flag(names=("-ctk", "cache_type_k"), flag="-ctk"),
        "n_gpu_layers": Flag(names=("-ngl", "gpu_layers", "n_gpu_layers"), flag="-ngl"),
    },
}


@dataclass(frozen=True, kw_only=True)
class Step:
    """One change: a sentence, the knobs it sets, and bounds learnt that no flag carries."""

    sentence: str
    knobs: tuple[tuple[str, int | float | str | bool], ...]
    learnt: tuple[tuple[str, float], ...] = ()


class Case:
    """What a rule may look at."""

    def __init__(self, engine: str, words: Words, death: Death, plan: Plan) -> None:
        self.engine, self.words, self.death, self.plan = engine, words, death, plan
        assert death.found is not None
        self.found = death.found
        self.fact = self.found.facts[0]
        self.phase = self.found.phase
        self.settings = dict(self.found.settings)

    def whole(self, knob: str) -> int | None:
        """Return a count as the command line gives it."""
        return self.words.whole(FLAGS[self.engine][knob].names)

    def has(self, knob: str) -> bool:
        """Return whether the command line gives a setting."""
        return self.words.find(FLAGS[self.engine][knob].names) is not None

    def share(self, knob: str) -> float | None:
        """Return the share of the card: from the command line, the log, the engine's message, else the default."""
        given = self.words.number(FLAGS[self.engine][knob].names)
        if given is None and knob in self.settings:
            given = float(self.settings[knob])
        if given is None and knob == "gpu_memory_utilization":
            given = float(self.fact.detail("utilization") or _default_share())
        if given is None and self.fact.detail("fraction"):
            given = float(self.fact.detail("fraction"))
        return given


def _default_share() -> float:
    from ullage.engines.vllm.defaults import Version
    from ullage.request import newest_version

    return float(Version(number=newest_version("vllm")).setting("gpu_memory_utilization"))


def next_step(engine: str, words: Words, death: Death, plan: Plan) -> Step | None:
    """Return the next smaller setting, None when there is none left."""
    if death.found is None or not death.found.facts:
        return None
    rule = _RULES.get((engine, death.kind)) or _RULES.get((engine, ""))
    return next(rule(Case(engine, words, death, plan)), None) if rule is not None else None


def _lower(case: Case, knob: str) -> Iterator[Step]:
    """Leave more room outside the share: down by what was missing and a little more, not below a share that failed."""
    share = case.share(knob)
    if share is None:
        share = 0.9 if case.engine == "sglang" else _default_share()
    sizes = dict(case.found.sizes)
    gap, total = sizes.get("gap") or sizes.get("requested"), sizes.get("capacity")
    less = SHARE_STEP if not gap or not total else min(0.3, max(0.02, gap / total + 0.01))
    bound = float(case.plan.get("share_too_small", LOWEST_SHARE))
    lower = round(share - less, 2)
    if lower <= bound:
        lower = round((share + bound) / 2, 2)
    if not bound < lower < share:
        return
    sentence = _("memory was short outside the engine's share of the card: {old:.2f} becomes {new:.2f}")
    yield Step(
        sentence=sentence.format(old=share, new=lower), knobs=((knob, lower),), learnt=(("share_too_large", share),)
    )


def _raise(case: Case, knob: str, highest: float, wanted: float | None = None) -> Iterator[Step]:
    """Give the engine a larger share, below one that has failed for being too large."""
    share = case.share(knob)
    if share is None:
        share = 0.8  # SGLang works its own out: what it printed is not in the log
    bound = min(highest, float(case.plan.get("share_too_large", highest + 0.01)) - 0.01)
    higher = min(bound, round(max(share + 0.01, wanted or share + SHARE_STEP), 2))
    if round(higher, 2) <= share:
        return
    sentence = _("the KV cache found no room in the engine's share of the card: {old:.2f} becomes {new:.2f}")
    yield Step(
        sentence=sentence.format(old=share, new=higher),
        knobs=((knob, round(higher, 2)),),
        learnt=(("share_too_small", share),),
    )


def _halve(case: Case, knob: str, least: int, start: int, sentence: str) -> Iterator[Step]:
    """Halve a count; ``start`` is set where the command line gives none."""
    now = case.whole(knob)
    new = start if now is None else max(least, now // 2)
    if new >= least and (now is None or new < now):
        yield Step(sentence=sentence.format(old=now if now is not None else "-", new=new), knobs=((knob, new),))


def _shorter(case: Case) -> Iterator[Step]:
    """Take the longest request that the engine itself says would fit, else half."""
    wanted = case.fact.count("max_model_len") or case.whole("max_model_len")
    says = case.fact.count("estimated") or case.fact.count("kv_cache_tokens")
    given = case.whole("max_model_len")
    if says is not None and says >= 1 and (given is None or says < given):
        sentence = _("the engine says that requests of at most {new:,} tokens fit (asked for: {old})")
        yield Step(
            sentence=sentence.format(new=says, old=f"{wanted:,}" if wanted else "-"), knobs=(("max_model_len", says),)
        )
    elif wanted is not None and wanted // 2 >= LEAST_CONTEXT:
        sentence = _("half the longest request: {old:,} tokens become {new:,}")
        yield Step(sentence=sentence.format(old=wanted, new=wanted // 2), knobs=(("max_model_len", wanted // 2),))


def _eager(case: Case) -> Iterator[Step]:
    if not case.has("enforce_eager"):
        yield Step(sentence=_("no CUDA graphs"), knobs=(("enforce_eager", True),))


def _vllm_pool(case: Case) -> Iterator[Step]:
    needed, available = case.fact.size("needed"), case.fact.size("available")
    share, total = case.share("gpu_memory_utilization") or 0.0, dict(case.found.sizes).get("capacity")
    if needed and available is not None and total:
        wanted = share + (needed - available) / total + 0.01
        if wanted <= HIGHEST_SHARE:
            yield from _raise(case, "gpu_memory_utilization", HIGHEST_SHARE, wanted)
    if case.fact.count("estimated") or (case.fact.count("kv_cache_tokens") or 0) > 0:
        yield from _shorter(case)
    yield from _raise(case, "gpu_memory_utilization", HIGHEST_SHARE, HIGHEST_SHARE)
    yield from _smaller_passes(case)
    yield from _eager(case)


def _smaller_passes(case: Case) -> Iterator[Step]:
    yield from _halve(
        case, "max_num_batched_tokens", LEAST_BATCHED_TOKENS, 2048, _("fewer tokens in a pass: {old} becomes {new}")
    )
    yield from _halve(case, "max_num_seqs", LEAST_SEQS, 64, _("fewer requests at a time: {old} becomes {new}"))


def _vllm_oom(case: Case) -> Iterator[Step]:
    """Weights that do not fit stay too large; the profiling pass runs before the share is cut up."""
    phase = case.phase or case.fact.detail("phase")
    if phase == "load":
        return
    if phase == "profiling":
        yield from _smaller_passes(case)
        return
    yield from _lower(case, "gpu_memory_utilization")
    yield from _smaller_passes(case)
    yield from _eager(case)


def _vllm_start(case: Case) -> Iterator[Step]:
    """Take what is free, as the engine's message gives it."""
    free, capacity = case.fact.size("free"), case.fact.size("capacity")
    if not free or not capacity:
        yield Step(sentence=_("memory moved while the engine measured its own: once more"), knobs=())
        return
    share = int(100 * free / capacity - 0.5) / 100
    if LOWEST_SHARE <= share < (case.share("gpu_memory_utilization") or 1.0):
        sentence = _("only {share:.0%} of the card is free: the engine gets that")
        yield Step(
            sentence=sentence.format(share=share),
            knobs=(("gpu_memory_utilization", share),),
            learnt=(("share_too_large", case.share("gpu_memory_utilization") or 1.0),),
        )


def _sglang_pool(case: Case) -> Iterator[Step]:
    if case.fact.kind == "pool_full":
        yield from _halve(case, "max_running_requests", 1, 64, _("fewer requests at a time: {old} becomes {new}"))
        return
    needed = case.fact.detail("needed_fraction")
    yield from _raise(case, "mem_fraction_static", HIGHEST_STATIC, float(needed) + 0.02 if needed else None)


def _sglang_oom(case: Case) -> Iterator[Step]:
    phase = case.phase or case.fact.detail("phase")
    if phase == "load":
        return
    yield from _lower(case, "mem_fraction_static")
    if phase == "graph capture":
        yield from _halve(
            case, "cuda_graph_max_bs", LEAST_GRAPH_BATCH, 16, _("smaller captured batches: {old} becomes {new}")
        )
    yield from _halve(case, "chunked_prefill_size", 512, 2048, _("smaller chunks of prompts: {old} becomes {new}"))


def _llama(case: Case) -> Iterator[Step]:
    role = case.fact.detail("role")
    if role == "kv_cache":
        if not case.has("cache_type_k"):
            sentence = _("keys of the cache in 8 bits")
            yield Step(sentence=sentence, knobs=(("cache_type_k", "q8_0"),))
        yield from _shorter(case)
    elif role == "weights":
        layers = case.whole("n_gpu_layers")
        if layers is not None and 0 < layers <= 200:
            less = layers * 3 // 4
            sentence = _("fewer layers on the GPU: {old} becomes {new}").format(old=layers, new=less)
            yield Step(sentence=sentence, knobs=(("n_gpu_layers", less),))
    else:
        yield from _halve(
            case, "ubatch_size", LEAST_UBATCH, 256, _("smaller batches of prompt tokens: {old} becomes {new}")
        )
        yield from _shorter(case)


_RULES: dict[tuple[str, str], Callable[[Case], Iterator[Step]]] = {
    ("vllm", "kv_pool"): _vllm_pool,
    ("vllm", "start_budget"): _vllm_start,
    ("vllm", "device_oom"): _vllm_oom,
    ("vllm", "library_oom"): _vllm_oom,
    ("sglang", "kv_pool"): _sglang_pool,
    ("sglang", "device_oom"): _sglang_oom,
    ("sglang", "library_oom"): _sglang_oom,
    ("llamacpp", ""): _llama,
}


def put_knob(engine: str, words: Words, knob: str, value: object) -> bool:
    """Write a knob into the command line; false for one that no flag carries."""
    flag = FLAGS.get(engine, {}).get(knob)
    if flag is None:
        return False
    if flag.switch:
        if value is True:
            words.put(flag.names, "", flag=flag.flag)
        return True
    words.put(flag.names, f"{value}", flag=flag.flag)
    return True
