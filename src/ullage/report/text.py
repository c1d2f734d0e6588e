"""A fit as text for people: the verdict first, then where the memory goes, what is largest, and what to do next."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ullage.advise import gain_text
from ullage.fitting import ELASTIC_POOLS, Advice, FitResult, job_summary
from ullage.i18n import _
from ullage.ledger import Certainty, Ledger, Term, merged
from ullage.report.json import metrics as metrics_of
from ullage.units import format_bytes

MARKS = {"fits": ("✔", "green"), "tight": ("≈", "yellow"), "does_not_fit": ("✘", "red")}
BAR_WIDTH = 16
#: A source of fewer characters says nothing.
LEAST_SOURCE = 8
_EIGHTHS = " ▏▎▍▌▋▊▉"
#: Terms below this share of the device are shown as one line.
SMALL_SHARE = 0.002
#: Changes that are printed; JSON has all.
ADVICE_SHOWN = 5


def print_fit(result: FitResult, *, metrics: bool = False, console: Console | None = None) -> None:
    """Print a fit on stdout."""
    out = console or Console(highlight=False)
    _print_verdict(out, result)
    print_terms(out, result.ledger, result.total_bytes.value, result.reserve_bytes)
    if result.verdict != "does_not_fit" and result.job.engine in ELASTIC_POOLS:
        filled = _("{engine} fills its share of the device: what the need leaves becomes KV cache")
        print_line(out, escape(filled.format(engine=result.job.engine)), style="dim")
    _print_largest(out, result)
    if metrics:
        _print_metrics(out, result)
    _print_advice(out, result)
    _print_notes(out, result)
    print_next(out, result.next_command)


def print_next(out: Console, command: str) -> None:
    """Print what to type next, on one line, so that it can be copied."""
    if command:
        out.print(f"\n[bold]{_('Next')}[/bold]")
        out.print(f"  {escape(command)}", soft_wrap=True)


def print_line(out: Console, markup: str, style: str = "") -> None:
    """Print a sentence indented by two, wrapped lines too."""
    for line in Text.from_markup(markup, style=style).wrap(out, max(20, out.width - 2)):
        line.rstrip()
        out.print(Text("  ") + line, soft_wrap=True)


def fullest(rank: int, count: int, moment: str) -> str:
    """Say which rank is fullest, and when."""
    if count == 1:
        return _("fullest: rank {rank}, {moment}").format(rank=rank, moment=moment)
    return _("fullest: rank {rank} ({count:,} alike), {moment}").format(rank=rank, count=count, moment=moment)


def verdict_word(verdict: str) -> str:
    """Return the verdict for people."""
    return {"fits": _("fits"), "tight": _("tight"), "does_not_fit": _("does not fit")}[verdict]


def _print_verdict(out: Console, result: FitResult) -> None:
    mark, colour = MARKS[result.verdict]
    job, machine = result.job, result.job.machine
    out.print(
        f"[bold {colour}]{mark} {verdict_word(result.verdict)}[/bold {colour}]  "
        + escape(
            _("{model} on {count} x {gpu}, {engine} {version}").format(
                model=job.model.name + (f" ({job.quantization})" if job.quantization else ""),
                count=machine.num_gpus,
                gpu=machine.gpu.name,
                engine=job.engine,
                version=job.engine_version,
            )
        ),
        soft_wrap=True,
    )
    need = _("{need} of {total} needed per GPU for {requests} of {context:,} tokens").format(
        need=format_bytes(result.need.value),
        total=format_bytes(result.total_bytes.value),
        requests=_requests(result.concurrency),
        context=result.context,
    )
    print_line(out, f"{escape(need)}; {escape(result.reason)}")
    ledger = result.ledger
    used = ledger.device_used
    on_device = _("{used} on the device ({low} to {high})").format(
        used=format_bytes(used.bytes), low=format_bytes(used.low_bytes), high=format_bytes(used.high_bytes)
    )
    print_line(out, escape(f"{fullest(ledger.rank, result.worst.num_ranks, ledger.moment)}: {on_device}"))
    out.print()


def _requests(count: int) -> str:
    return _("1 request") if count == 1 else _("{count:,} requests").format(count=count)


def print_terms(out: Console, ledger: Ledger, total: float, reserve_bytes: int) -> None:
    """Print the terms of a ledger, largest first, against a device of ``total`` bytes."""
    terms = sorted(merged(ledger.terms()), key=lambda term: -term.bytes)
    small = [term for term in terms if term.high_bytes < SMALL_SHARE * total]
    small = small if len(small) >= 3 else []
    rows = [
        (term.name, format_bytes(term.bytes), term.bytes, _sure(term), short_source(term.source or _first_source(term)))
        for term in terms
        if term not in small
    ]
    if small:
        size = sum(term.bytes for term in small)
        names = ", ".join(term.name for term in small)
        rows.append((_("{count} small ones").format(count=len(small)), format_bytes(size), size, "", names))
    free = int(total - ledger.device_used.bytes)
    kept = _("{size} asked to stay free").format(size=format_bytes(reserve_bytes))
    rows.append((_("free"), format_bytes(free), free, "", kept))
    out.print(_table(out.width, rows, total))


def _widest(texts: Iterable[str]) -> int:
    return max(map(len, texts))


def _table(width: int, rows: list[tuple[str, str, int, str, str]], total: float) -> Table:
    """Return the table of terms.

    Figures are never cut: the source takes what the terminal leaves; where it is narrow, the bars go first, then the
    source, then how sure each term is.
    """
    titles = [_("term"), _("size"), _("share"), _("certainty"), _("source")]
    shares = [size / total if total else 0.0 for _name, _text, size, _sure, _source in rows]
    percents = max(4, _widest(map(_percent, shares)))
    name, size, sure = (_widest([titles[at], *(str(row[at]) for row in rows)]) for at in (0, 1, 3))
    bar_width, gaps = 8 if width < 100 else BAR_WIDTH, 2 * 4
    if (left := width - name - size - sure - percents - bar_width - 1 - gaps) < LEAST_SOURCE:
        bar_width, left = 0, left + bar_width + 1
    share = max(len(titles[2]), percents + (bar_width + 1 if bar_width else 0))
    shown = 5 if left >= LEAST_SOURCE else 4 if left + 2 >= 0 else 3
    name = max(8, min(name, width - size - share - 4)) if shown == 3 else name
    widths = [name, size, share, sure, max(left, 0)]
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for title, size in list(zip(titles, widths, strict=True))[:shown]:
        right = title == titles[1]
        table.add_column(title, justify="right" if right else "left", width=size, no_wrap=True, overflow="ellipsis")
    for row, part in zip(rows, shares, strict=True):
        drawn = bar(part, bar_width, percents) if bar_width else _percent(part).rjust(percents)
        cells = (escape(row[0]), row[1], drawn, escape(row[3]), f"[dim]{escape(row[4])}[/dim]")
        table.add_row(*cells[:shown])
    return table


def _sure(term: Term) -> str:
    if term.certainty is Certainty.EXACT or term.high_bytes == term.low_bytes:
        return term.certainty.value
    spread = max(term.high_bytes - term.bytes, term.bytes - term.low_bytes)
    return f"{term.certainty.value} ±{format_bytes(spread)}"


def _first_source(term: Term) -> str:
    return next((part.source for part in term.walk() if part.source), "")


def bar(share: float, width: int = BAR_WIDTH, percents: int = 4) -> str:
    """Return a bar and a percentage for a share of the device."""
    eighths = round(min(max(share, 0.0), 1.0) * width * 8)
    drawn = "█" * (eighths // 8) + (_EIGHTHS[eighths % 8] if eighths % 8 else "")
    return f"{drawn:<{width}} {_percent(share):>{percents}}"


def _percent(share: float) -> str:
    return f"{min(max(share, -99.99), 99.99):.0%}"


def short_source(source: str) -> str:
    """Shorten ``project@version:long/path/file.py:function`` to what fits in a column."""
    first = re.split(r"[;,] ", source, maxsplit=1)[0]
    match = re.fullmatch(r"([\w.-]+@[\w.-]+):(?:\S*/)?([\w.-]+)(?::(\S+))?", first)
    if match is None:
        return first
    return f"{match.group(1)} {match.group(2)}" + (f":{match.group(3)}" if match.group(3) else "")


def _count(value: float) -> str:
    return f"{int(value):,}" if math.isfinite(value) else "∞"


def _print_largest(out: Console, result: FitResult) -> None:
    out.print(f"\n[bold]{_('Largest that fits')}[/bold]")
    most = result.max_concurrency
    if most.high < 1 and result.max_context < 1:
        print_line(out, _("nothing: no room is left for a single request"))
        return
    spread = f" ({_count(most.low)} – {_count(most.high)})" if most.low != most.high else ""
    print_line(
        out,
        _("{count} requests of {context:,} tokens at a time").format(
            count=_count(most.value) + spread, context=result.context
        ),
    )
    one = _("one request of {context:,} tokens")
    several = _("{context:,} tokens in each of {count:,} requests")
    words = one if result.concurrency == 1 else several
    print_line(out, words.format(context=result.max_context, count=result.concurrency))
    points = " · ".join(f"{_short(point.context)} x {point.concurrency:,}" for point in result.curve)
    if points:
        print_line(out, escape(_("context x requests: {points}").format(points=points)))
    print_line(
        out,
        _("KV cache: {token} per token, {request} per request, per GPU").format(
            token=format_bytes(result.engine.kv.bytes_per_token),
            request=format_bytes(result.engine.kv.fixed_bytes_per_request),
        ),
    )


def _short(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else f"{tokens:,}"


def _print_metrics(out: Console, result: FitResult) -> None:
    out.print(f"\n[bold]{_('Ratios')}[/bold]")
    for name, value in metrics_of(result).items():
        out.print(f"  {name:<26} {'–' if value is None else f'{value:,.4g}'}")


def _print_advice(out: Console, result: FitResult) -> None:
    if not result.advice:
        return
    title = _("More room") if result.verdict == "fits" else _("Cheapest changes")
    out.print(f"\n[bold]{title}[/bold]")
    for item in result.advice[:ADVICE_SHOWN]:
        gives = _("{verdict}, {count:,} requests").format(
            verdict=verdict_word(item.verdict), count=item.max_concurrency
        )
        if item.gain_bytes > 0:
            gives = f"{gain_text(item)}, {gives}"
        print_line(out, f"[bold]{escape(item.change)}[/bold]: {escape(gives)} [dim]({escape(_costs(item))})[/dim]")


def _costs(item: Advice) -> str:
    """Return the cost of an advice and how it is typed."""
    return "; ".join(part for part in (item.cost, item.typed or item.flags) if part)


def _print_notes(out: Console, result: FitResult) -> None:
    print_list(out, _("Assumed"), job_summary(result)["assumed"])
    print_list(out, _("Warnings"), result.warnings)


def print_list(out: Console, title: str, sentences: Iterable[str]) -> None:
    """Print sentences under a title; nothing when there are none."""
    found = list(sentences)
    if not found:
        return
    out.print(f"\n[bold]{title}[/bold]")
    for sentence in found:
        print_line(out, escape(sentence), style="dim")
