"""``ullage bench serve``: an OpenAI-compatible endpoint idle, at rising concurrency to its break point, changing."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ullage.bench import loads
from ullage.bench.client import Answer, Endpoint, ask, first_model
from ullage.bench.curves import StepRow, median, quantile, stability
from ullage.bench.outcome import BenchResult, Phase, RankMemory
from ullage.bench.search import BreakPoint, Try, break_point
from ullage.bench.watching import Watching, watching
from ullage.errors import InputError, MissingExtraError
from ullage.i18n import _

#: A larger load that brings less than this much more throughput, at a slower first token, is past the knee.
KNEE_GAIN = 0.05
#: ... when its first token takes at least this much longer.
KNEE_WAIT = 1.5


@dataclass(frozen=True, kw_only=True)
class ServeBench:
    """What is asked. ``key_variable`` names the environment variable with the key; the key itself is never kept.

    Attributes:
        requests: of each try, at least as many as run at a time.
        max_ttft, max_gap: P95 limits in seconds; beyond them a size counts as dead.
        knee: a size also counts as dead when it brings no more throughput, at a slower first token.
        pid, nvml, recording: where the memory of the server is seen.
        gpu, num_gpus, engine: for the records.
    """

    url: str
    model: str | None = None
    api: str = "completions"
    key_variable: str | None = None
    prompt_tokens: int = 128
    output_tokens: int = 32
    word: str = "hello"
    first: int = 1
    cap: int = 256
    requests: int = 8
    max_ttft: float | None = None
    max_gap: float | None = None
    knee: bool = True
    timeout: float = 120.0
    idle_seconds: float = 2.0
    pid: int | None = None
    nvml: str | None = None
    recording: Path | None = None
    gpu: str | None = None
    num_gpus: int = 1
    engine: str | None = None


def bench_serve(asked: ServeBench, progress: Callable[[str], None]) -> BenchResult:
    """Run the three phases against the endpoint.

    Raises:
        InputError: the endpoint cannot be reached, lists no model, or refuses a single request.
        MissingExtraError: httpx is not installed.
    """
    try:
        import httpx  # noqa: F401
    except ImportError:
        raise MissingExtraError("httpx", "bench") from None
    watch = watching(pid=asked.pid, nvml=asked.nvml, recording=asked.recording)
    return asyncio.run(_Bench(asked, watch, progress).run())


class _Bench:
    """One run: the client, the clock, and the answers so far."""

    def __init__(self, asked: ServeBench, watch: Watching, progress: Callable[[str], None]) -> None:
        self.asked, self.watch, self.progress = asked, watch, progress
        self.waves: list[dict[str, Any]] = []
        self.clock = time.perf_counter()
        self.client: Any = None
        self.endpoint = Endpoint(url="", model="")

    async def run(self) -> BenchResult:
        """Run all phases."""
        import httpx

        started = datetime.now(timezone.utc)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with httpx.AsyncClient(limits=limits, trust_env=False) as self.client:
            self.endpoint = await self._endpoint()
            await self._first_request()
            with self.watch:
                self.clock = self.watch.clock
                phases, found = await self._phases()
        changing = phases[-1] if phases[-1].name == "changing_load" else None
        return BenchResult(
            kind="serve",
            started=started.isoformat(timespec="seconds"),
            memory=self.watch.kind,
            job=self._job(),
            machine={"url": self.endpoint.url, "model": self.endpoint.model, "num_ranks": 1, "gpu": self.asked.gpu},
            phases=tuple(phases),
            break_point=found,
            stability=stability(_as_steps(changing)) if changing is not None else None,
            warnings=tuple(self.watch.warnings),
        )

    async def _phases(self) -> tuple[list[Phase], BreakPoint]:
        asked = self.asked
        self.progress(_("idle"))
        await asyncio.sleep(asked.idle_seconds)
        phases = [self._phase("idle", 0.0, [])]
        begun = time.perf_counter() - self.clock
        found = await self._search()
        at_best = [wave for wave in self.waves if wave["concurrency"] == found.largest] or self.waves
        phases.append(self._phase("full_load", begun, self.waves, figures_of=at_best[-1:]))
        if found.largest < 1:
            return phases, found
        begun = time.perf_counter() - self.clock
        self.waves = []
        for wave in loads.changing_waves(found.largest, asked.prompt_tokens, asked.requests):
            self.progress(
                _("changing load: {label}, {count} at a time, {tokens} tokens").format(
                    label=wave.label, count=wave.concurrency, tokens=wave.prompt_tokens
                )
            )
            await self._wave(wave)
        phases.append(self._phase("changing_load", begun, self.waves))
        return phases, found

    async def _search(self) -> BreakPoint:
        """Raise the concurrency; the search is synchronous, so its tries are run from a thread beside this loop."""
        loop = asyncio.get_running_loop()
        best: dict[str, float] = {}

        def attempt(size: int) -> Try:
            self.progress(_("full load: {size} requests at a time").format(size=size))
            wave = loads.Wave(
                label="full",
                concurrency=size,
                num_requests=max(self.asked.requests, 2 * size),
                prompt_tokens=self.asked.prompt_tokens,
            )
            found = asyncio.run_coroutine_threadsafe(self._wave(wave), loop).result()
            cause, detail = self._cause(found, best)
            if cause == "throughput":  # a slow moment of the machine looks the same: ask once more
                found = asyncio.run_coroutine_threadsafe(self._wave(wave), loop).result()
                cause, detail = self._cause(found, best)
            return Try(
                size=size,
                lives=not cause,
                cause=cause,
                detail=detail,
                seconds=round(found["seconds"], 3),
                peak_bytes=self.watch.peak(found["t"], found["t"] + found["seconds"]),
            )

        return await asyncio.to_thread(
            break_point, attempt, unit="concurrency", first=self.asked.first, cap=self.asked.cap, tolerance=0.1
        )

    def _cause(self, wave: dict[str, Any], best: dict[str, float]) -> tuple[str, str]:
        """Return why a size counts as dead: requests that failed, a limit broken, or past the knee."""
        if wave["num_errors"]:
            return "errors", wave["errors"][0]
        for name, field, limit in (
            (_("first token"), "ttft_p95_seconds", self.asked.max_ttft),
            (_("next token"), "inter_token_p95_seconds", self.asked.max_gap),
        ):
            if limit is not None and wave[field] > limit:
                return "latency", _("{what} after {seconds:.3g} s (p95)").format(what=name, seconds=wave[field])
        rate, wait = wave["output_tokens_per_second"], wave["ttft_p95_seconds"]
        larger = not best or wave["concurrency"] > best["size"]
        if (
            best
            and larger
            and self.asked.knee
            and rate < best["rate"] * (1 + KNEE_GAIN)
            and wait > best["wait"] * KNEE_WAIT
        ):
            sentence = _("{rate:,.0f} tokens/s, not more than {best:,.0f} with {size:,.0f} at a time")
            return "throughput", sentence.format(rate=rate, best=best["rate"], size=best["size"])
        if larger:
            best.update(rate=rate, wait=wait, size=wave["concurrency"])
        return "", ""

    async def _wave(self, wave: loads.Wave) -> dict[str, Any]:
        """Keep ``concurrency`` requests under way until ``num_requests`` are done."""
        prompt = " ".join([self.asked.word] * wave.prompt_tokens)
        left = iter(range(wave.num_requests))
        answers: list[Answer] = []

        async def one_after_another() -> None:
            answers.extend(
                [await ask(self.client, self.endpoint, prompt, self.asked.output_tokens, self.clock) for _each in left]
            )

        begun = time.perf_counter()
        await asyncio.gather(*(one_after_another() for _each in range(min(wave.concurrency, wave.num_requests))))
        seconds = time.perf_counter() - begun
        found = {
            "t": round(begun - self.clock, 4),
            "seconds": round(seconds, 4),
            **vars(wave),
            **summary(answers, seconds),
        }
        self.waves.append(found)
        return found

    async def _endpoint(self) -> Endpoint:
        asked = self.asked
        url = asked.url.rstrip("/").removesuffix("/v1")
        if not url.startswith(("http://", "https://")):
            raise InputError(
                _("is not a URL"), where=asked.url[:200], remedy=_("write for example http://localhost:8000")
            )
        headers = {}
        if asked.key_variable:
            key = os.environ.get(asked.key_variable)
            if not key:
                raise InputError(_("the environment variable is not set"), where=asked.key_variable[:80])
            headers["Authorization"] = f"Bearer {key}"
        model = asked.model or await first_model(self.client, url, headers)
        if model is None:
            raise InputError(_("the endpoint lists no model"), where=url[:200], remedy=_("name it with --model"))
        return Endpoint(url=url, model=model, api=asked.api, headers=headers, timeout=asked.timeout)

    async def _first_request(self) -> None:
        """Ask once before anything is measured: an endpoint that refuses is an error of the call, not a result."""
        answer = await ask(self.client, self.endpoint, self.asked.word, 1, self.clock)
        if answer.error:
            raise InputError(
                _("the endpoint does not answer: {error}").format(error=answer.error), where=self.endpoint.address
            )

    def _phase(
        self,
        name: str,
        begun: float,
        waves: Sequence[dict[str, Any]],
        figures_of: Sequence[dict[str, Any]] | None = None,
    ) -> Phase:
        self.watch.look()
        seconds = time.perf_counter() - self.clock - begun
        shifted = [{**wave, "t": round(wave["t"] - begun, 4)} for wave in waves]
        chosen = shifted if figures_of is None else figures_of
        return Phase(
            name=name,
            seconds=round(seconds, 3),
            ranks=self._memory(begun, begun + seconds),
            waves=tuple(shifted),
            figures=_figures(chosen) if waves else {},
        )

    def _memory(self, begun: float, ended: float) -> tuple[RankMemory, ...]:
        curve = self.watch.between(begun, ended)
        if not curve:
            return ()
        return (RankMemory(rank=0, curve=tuple(curve), peak_used_bytes=max(one.used_bytes for one in curve)),)

    def _job(self) -> dict[str, Any]:
        asked = self.asked
        engine, _at, version = (asked.engine or "").partition("@")
        record = {
            "kind": "serve",
            "model": self.endpoint.model,
            "gpu": asked.gpu,
            "num_gpus": asked.num_gpus,
            "engine": engine or "unknown",
            "engine_version": version,
            "unknown": ["the engine's settings: the bench sees the endpoint alone"],
        }
        kept = ("api", "prompt_tokens", "output_tokens", "requests", "max_ttft", "max_gap", "timeout")
        return {**{name: getattr(asked, name) for name in kept}, "model": self.endpoint.model, "record": record}


def summary(answers: Iterable[Answer], seconds: float) -> dict[str, Any]:
    """Return the figures of a wave: those of first tokens and gaps from the requests that were answered."""
    every = list(answers)
    good = [one for one in every if not one.error]
    first = [one.ttft for one in good if one.ttft is not None]
    gaps = [gap for one in good for gap in one.gaps]
    tokens = sum(one.output_tokens for one in good)
    counted = [one.prompt_tokens for one in good if one.prompt_tokens is not None]
    return {
        "num_answered": len(good),
        "num_errors": len(every) - len(good),
        "errors": sorted({one.error for one in every if one.error})[:5],
        "ttft_p50_seconds": median(first),
        "ttft_p95_seconds": quantile(first, 0.95),
        "inter_token_p50_seconds": median(gaps),
        "inter_token_p95_seconds": quantile(gaps, 0.95),
        "request_p50_seconds": median([one.seconds for one in good]),
        "output_tokens": tokens,
        "output_tokens_per_second": tokens / seconds if seconds else 0.0,
        "measured_prompt_tokens": round(median([float(one) for one in counted])) if counted else None,
    }


def _figures(waves: Sequence[dict[str, Any]]) -> dict[str, float | int | None]:
    busy = sum(wave["seconds"] for wave in waves)
    return {
        "num_requests": sum(wave["num_requests"] for wave in waves),
        "num_errors": sum(wave["num_errors"] for wave in waves),
        "ttft_p50_seconds": median([wave["ttft_p50_seconds"] for wave in waves]),
        "ttft_p95_seconds": max(wave["ttft_p95_seconds"] for wave in waves),
        "inter_token_p50_seconds": median([wave["inter_token_p50_seconds"] for wave in waves]),
        "inter_token_p95_seconds": max(wave["inter_token_p95_seconds"] for wave in waves),
        "output_tokens_per_second": sum(wave["output_tokens"] for wave in waves) / busy if busy else None,
    }


def _as_steps(phase: Phase) -> list[StepRow]:
    """Return the waves as steps whose time is that of a request, so that drift and recovery are read off alike."""
    curve = phase.ranks[0].curve if phase.ranks else ()
    rows = []
    for wave in phase.waves:
        end = wave["t"] + wave["seconds"]
        after = [sample for sample in curve if wave["t"] <= sample.t <= end]
        rows.append(
            StepRow(
                t=end - wave["request_p50_seconds"],
                label=wave["label"],
                micro_batch=wave["concurrency"],
                seq=wave["prompt_tokens"],
                seconds=wave["request_p50_seconds"],
                after=after[-1] if after else None,
            )
        )
    return rows
