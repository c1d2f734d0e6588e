"""Every setting of a start filled in: what was given, else what the release takes for this card and model."""

from __future__ import annotations

from ullage.engines.sglang import fraction, graphs, traits
from ullage.engines.sglang.flags import Flags, flags_of
from ullage.engines.sglang.traits import Traits
from ullage.engines.sglang.versions import Release, resolve
from ullage.errors import InputError, LayoutError
from ullage.frozen import Frozen
from ullage.i18n import _
from ullage.spec.serving import ServingJob
from ullage.units import MiB, canonical_dtype

_KV_FP8 = {"fp8": "float8_e4m3", "fp8_e4m3": "float8_e4m3", "fp8_e5m2": "float8_e5m2", "fp8_ds_mla": "float8_e4m3"}
_KV_KNOWN = ("auto", "bfloat16", "float16", "fp8_e4m3", "fp8_e5m2", "fp4_e2m1", "mxfp8", "nvfp4")


class Settings(Frozen):
    """A start with nothing left open.

    Attributes:
        capacity_mib: the card as ``nvidia-smi`` reports it, by which SGLang takes its defaults.
        tp, pp, copies: tensor and pipeline ranks of one replica, and replicas side by side (plain data parallelism).
        attention_dp, expert_ranks: how attention and experts divide the tensor ranks.
        mem_fraction: ``mem_fraction_static``; where it is a default, ``assumed`` says how it came about.
        kv_dtype: element format of the cache; row_format: the layout name of :mod:`ullage.account.kv_cache`.
        graph_sizes: captured decode batches, empty without graphs.
        max_running: requests per attention rank as given, None: derived from the pool.
        draft_tokens: speculative tokens checked at a time, 0 without speculation.
    """

    job: ServingJob
    release: Release
    flags: Flags
    traits: Traits
    capacity_mib: float
    tp: int
    pp: int
    copies: int
    attention_dp: int
    expert_ranks: int
    mem_fraction: float
    chunk: int
    context: int
    kv_dtype: str
    row_format: str
    page: int
    graph_sizes: tuple[int, ...]
    graph_max: int
    max_running: int | None
    draft_tokens: int
    draft_steps: int
    model_dtype: str
    assumed: tuple[str, ...]

    @property
    def attention_tp(self) -> int:
        """Ranks that share one attention replica."""
        return self.tp // self.attention_dp


class Layout(Frozen):
    """The sizes of :class:`Settings` that the fraction rules need too."""

    tp: int
    pp: int
    copies: int
    attention_dp: int
    expert_ranks: int


def settings_of(job: ServingJob) -> Settings:
    """Fill in a job by the rules of its release.

    Raises:
        InputError: a value cannot be used, or a version is not understood.
        LayoutError: sizes that cannot go together.
    """
    return _settings(job, resolve(job.engine_version), flags_of(job), traits.of(job.model))


def _settings(job: ServingJob, release: Release, flags: Flags, found: Traits) -> Settings:
    layout, capacity = _layout(job, release, flags, found), capacity_mib(job)
    assumed = [release.assumed] if release.assumed else []
    running = _max_running(job, flags, release, layout, found)
    graph_max, sizes = graphs.capture(job, flags, release, graphs.Card(mib=capacity, tp=layout.tp), running)
    chunk = _chunk(job, flags, release, capacity)
    draft_tokens, draft_steps = _draft(job, flags, release, assumed)
    demand = _demand(job, flags, found, layout, chunk, graph_max if sizes else 0)
    share = fraction.mem_fraction(demand, release, assumed)
    kv_dtype, row_format = _kv_format(job, release, found)
    return Settings(
        job=job,
        release=release,
        flags=flags,
        traits=found,
        capacity_mib=capacity,
        tp=layout.tp,
        pp=layout.pp,
        copies=layout.copies,
        attention_dp=layout.attention_dp,
        expert_ranks=layout.expert_ranks,
        mem_fraction=share,
        chunk=chunk,
        context=_context(job),
        kv_dtype=kv_dtype,
        row_format=row_format,
        page=_page(job, flags, release, found),
        graph_sizes=sizes,
        graph_max=graph_max,
        max_running=None if running is None else max(1, running // layout.attention_dp),
        draft_tokens=draft_tokens,
        draft_steps=draft_steps,
        model_dtype=canonical_dtype(job.weights_dtype or job.model.dtype),
        assumed=tuple(assumed),
    )


def _demand(
    job: ServingJob, flags: Flags, found: Traits, layout: Layout, chunk: int, graph_max: int
) -> fraction.Demand:
    """Return what the fraction rules look at."""
    return fraction.Demand(
        job=job,
        flags=flags,
        traits=found,
        capacity_mib=capacity_mib(job),
        ranks=layout.tp * layout.pp,
        attention_dp=layout.attention_dp,
        pp=layout.pp,
        chunk=chunk,
        graph_max=graph_max,
        speculative=_algorithm(job, flags),
    )


def capacity_mib(job: ServingJob) -> float:
    """Return what ``nvidia-smi`` reports for the card: the catalog's upper figure, or the total that was stated.

    Source: sglang@0.5.23:srt/utils/common.py:get_nvgpu_memory_capacity.
    """
    gpu = job.machine.gpu
    stated = job.device_total_bytes
    if stated is not None and not gpu.total_low_bytes <= stated <= gpu.total_high_bytes:
        return stated / MiB
    return gpu.total_high_bytes / MiB


def _algorithm(job: ServingJob, flags: Flags) -> str:
    name = flags.text("speculative_algorithm") or job.speculative or ""
    if name.lower() in ("", "none"):
        return ""
    return {"MTP": "EAGLE", "DRAFT": "STANDALONE", "NEXTN": "EAGLE"}.get(name.upper(), name.upper())


def _draft(job: ServingJob, flags: Flags, release: Release, assumed: list[str]) -> tuple[int, int]:
    """Return (draft tokens checked at a time, draft steps); 0, 0 without speculation."""
    if not _algorithm(job, flags):
        return 0, 0
    steps = flags.integer("speculative_num_steps") or job.num_speculative_tokens
    tokens = flags.integer("speculative_num_draft_tokens") or (steps + 1 if steps else None)
    if tokens is None:
        steps, _branches, tokens = release.rule("speculative_defaults")
        sentence = _("speculative decoding: {steps} steps and {tokens} draft tokens taken, the engine's default")
        assumed.append(sentence.format(steps=steps, tokens=tokens))
    return tokens, steps or tokens - 1


def _layout(job: ServingJob, release: Release, flags: Flags, found: Traits) -> Layout:
    """Return the sizes of a replica.

    Raises:
        LayoutError: sizes that do not divide.
    """
    parallel = job.parallel
    tp, pp, dp = parallel.tensor_parallel_size, parallel.pipeline_parallel_size, parallel.data_parallel_size
    dp_attention = parallel.dp_attention
    if found.dsa and release.rule("dsa")["forced_dp_attention"]:
        dp_attention, dp = True, tp
    attention_dp, copies = (dp, 1) if dp_attention else (1, dp)
    if tp % attention_dp:
        raise LayoutError(
            _("{tp} tensor-parallel ranks cannot hold {dp} attention replicas").format(tp=tp, dp=attention_dp),
            remedy=_("with DP attention, --dp-size must divide --tp-size"),
        )
    ranks = parallel.expert_parallel_size or (tp if parallel.expert_parallel else 1)
    if flags.all_to_all and parallel.expert_parallel_size in (None, 1):
        ranks = tp
    if ranks < 1 or tp % ranks:
        raise LayoutError(
            _("{tp} tensor-parallel ranks cannot be divided into {ep} expert-parallel ranks").format(tp=tp, ep=ranks),
            remedy=_("--ep-size must divide --tp-size"),
        )
    return Layout(tp=tp, pp=pp, copies=copies, attention_dp=attention_dp, expert_ranks=ranks)


def _chunk(job: ServingJob, flags: Flags, release: Release, capacity: float) -> int:
    """Return ``chunked_prefill_size``; -1 stands for no chunking, then a batch holds ``max_prefill_tokens``."""
    if job.max_num_batched_tokens is not None:
        given = job.max_num_batched_tokens
        return given if given > 0 else max(flags.integer("max_prefill_tokens") or 16384, 1)
    for below, tokens in release.rule("chunked_prefill_size"):
        if below is None or capacity < below:
            return int(tokens)
    raise AssertionError("the last row of the table has no limit")


def _context(job: ServingJob) -> int:
    context = job.max_model_len or job.model.max_position_embeddings
    if context <= 0:
        raise InputError(
            _("the context length of {model} is not known").format(model=job.model.name), remedy=_("give it")
        )
    return context


def _kv_format(job: ServingJob, release: Release, found: Traits) -> tuple[str, str]:
    """Return (element format, row layout) of the cache.

    Source: sglang@0.5.23:srt/arg_groups/overrides.py:_dsa_kv_cache_dtype_default, _deepseek_v4_kv_cache_dtype;
        srt/mem_cache/kv_cache_configurator.py:calculate_mla_kv_cache_dim.

    Raises:
        InputError: a format that SGLang does not have.
    """
    asked = (job.kv_cache_dtype or "auto").lower().removeprefix("torch.")
    asked = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "float8_e4m3fn": "fp8_e4m3"}.get(asked, asked)
    capability = job.machine.gpu.compute_capability or (9, 0)
    if found.v4:
        return ("bfloat16", "bfloat16") if asked == "bfloat16" else ("float8_e4m3", "fp8_ds_mla")
    if found.dsa:
        rule = release.rule("dsa")
        fp8 = asked in _KV_FP8 or (asked == "auto" and capability[0] >= rule["fp8_from_capability"])
        if not fp8:
            return "bfloat16", "bfloat16"
        raw = rule["trtllm_row_on_blackwell"] and capability[0] >= 10
        return "float8_e4m3", "float8_e4m3" if raw else "fp8_ds_mla"
    if asked == "auto":
        stored = job.model.quantization.kv_cache_dtype if job.model.quantization else None
        asked = "fp8_e4m3" if stored and "fp8" in stored.lower() else job.weights_dtype or job.model.dtype
    if asked in _KV_FP8:
        return _KV_FP8[asked], _KV_FP8[asked]
    if asked in ("fp4_e2m1", "nvfp4"):
        return "float4_e2m1", "float4_e2m1"
    if asked not in ("bfloat16", "float16", "float32", "auto") and asked not in _KV_KNOWN:
        raise InputError(
            _("SGLang has no cache format {name!r}").format(name=asked[:40]),
            remedy=_("known are {known}").format(known=", ".join(_KV_KNOWN)),
        )
    name = "float8_e4m3" if asked == "mxfp8" else canonical_dtype(asked)
    return name, name


def _page(job: ServingJob, flags: Flags, release: Release, found: Traits) -> int:
    """Return the page size: the model's or backend's where they fix it, else as given, else 1."""
    rule = release.rule("page_size")
    capability = job.machine.gpu.compute_capability or (9, 0)
    if found.v4:
        return int(rule["v4"])
    if found.dsa:
        return int(rule["dsa"])
    backend = " ".join(flags.text(f"{phase}attention_backend") for phase in ("", "decode_", "prefill_"))
    given = job.block_size or flags.integer("page_size")
    if "flashmla" in backend or "trtllm" in backend:
        return given if given in (16, 32, 64, 128) and "flashmla" not in backend else 64
    if "cutlass_mla" in backend:
        return 128
    since = rule["mla_from_capability"]
    if given is None and found.mla and since is not None and capability[0] == since and not backend.strip():
        return 64
    return given or int(rule["default"])


def _max_running(job: ServingJob, flags: Flags, release: Release, layout: Layout, found: Traits) -> int | None:
    """Return the requests over all attention ranks, as given or as the model or speculation fixes them.

    None: from the pool. Source: sglang@0.5.23:srt/arg_groups/speculative_hook.py, deepseek_v4_hook.py.
    """
    given = job.max_num_seqs or flags.integer("max_running_requests")
    if given is None and _algorithm(job, flags):
        given = int(release.rule("speculative_max_running_requests"))
    if given is None and found.v4:
        given = int(release.rule("v4_max_running_requests"))
    if given is not None and given < 1:
        raise InputError(_("{value} requests at a time cannot be").format(value=given))
    return given
