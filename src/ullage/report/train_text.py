"""A training fit as text: the verdict, the fullest rank at its worst moment, every rank class, the cheapest changes."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ullage.i18n import _
from ullage.report.text import (
    ADVICE_SHOWN,
    MARKS,
    fullest,
    print_line,
    print_list,
    print_next,
    print_terms,
    verdict_word,
)
from ullage.report.train_json import job_summary
from ullage.report.train_json import metrics as metrics_of
from ullage.training_fit import TrainingFit
from ullage.units import format_bytes

#: Classes of ranks shown; the rest is in the JSON.
MAX_RANKS = 20


def print_training(result: TrainingFit, *, metrics: bool = False, console: Console | None = None) -> None:
    """Print a training fit on stdout."""
    out = console or Console(highlight=False)
    _print_verdict(out, result)
    print_terms(out, result.ledger, result.total_bytes.value, result.reserve_bytes)
    _print_moments(out, result)
    if len(result.step.ranks) > 1:
        _print_ranks(out, result)
    _print_host(out, result)
    _print_routing(out, result)
    _print_largest(out, result)
    if metrics:
        out.print(f"\n[bold]{_('Ratios')}[/bold]")
        for name, value in metrics_of(result).items():
            out.print(f"  {name:<26} {'–' if value is None else f'{value:,.4g}'}")
    _print_advice(out, result)
    assumed = list(dict.fromkeys(job_summary(result)["assumed"]))
    print_list(out, _("Assumed"), assumed)
    warnings = dict.fromkeys((*result.step.warnings, *result.ledger.warnings))
    print_list(out, _("Warnings"), [sentence for sentence in warnings if sentence not in assumed])
    print_next(out, result.next_command)


def _print_verdict(out: Console, result: TrainingFit) -> None:
    mark, colour = MARKS[result.verdict]
    job, used = result.job, result.ledger.device_used
    title = _("{model} on {count} x {gpu}, {engine}").format(
        model=job.model.name, count=job.machine.num_gpus, gpu=job.machine.gpu.name, engine=job.engine
    )
    word = verdict_word(result.verdict)
    out.print(f"[bold {colour}]{mark} {word}[/bold {colour}]  {escape(title)}", soft_wrap=True)
    need = _("{used} of {total} on the fullest GPU ({low} to {high})").format(
        used=format_bytes(used.bytes),
        total=format_bytes(result.total_bytes.value),
        low=format_bytes(used.low_bytes),
        high=format_bytes(used.high_bytes),
    )
    print_line(out, f"{escape(need)}; {escape(result.reason)}")
    print_line(out, escape(fullest(result.worst.rank, result.worst.num_ranks, result.ledger.moment)))
    out.print()


def _print_moments(out: Console, result: TrainingFit) -> None:
    out.print(f"\n[bold]{_('Moments of the step, this rank')}[/bold]")
    table = _plain_table((_("moment"), _("allocated"), _("reserved"), _("device used")))
    for ledger in (*result.worst.moments, result.worst.after_step):
        sizes = (ledger.allocated.bytes, ledger.reserved.bytes, ledger.device_used.bytes)
        table.add_row(escape(ledger.moment), *map(format_bytes, sizes))
    out.print(table)


def _print_ranks(out: Console, result: TrainingFit) -> None:
    out.print(f"\n[bold]{_('Classes of equal ranks')}[/bold]")
    table = _plain_table((_("ranks"), _("stage"), _("worst moment"), _("allocated"), _("device used"), _("after step")))
    for rank in result.step.ranks[:MAX_RANKS]:
        sizes = (rank.peak.allocated.bytes, rank.peak.device_used.bytes, rank.after_step.allocated.bytes)
        table.add_row(f"{rank.num_ranks:,}", str(rank.pp_rank), escape(rank.peak.moment), *map(format_bytes, sizes))
    out.print(table)


def _print_host(out: Console, result: TrainingFit) -> None:
    """Print what offload keeps in host memory: of the rank that keeps most, and of all ranks of a node."""
    most = max(rank.host_bytes for rank in result.step.ranks)
    if not most:
        return
    machine = result.job.machine
    out.print(f"\n[bold]{_('Host memory')}[/bold]")
    sentence = _("{each} for a rank, {all} for the {count} of a node").format(
        each=format_bytes(most), all=format_bytes(most * machine.gpus_per_node), count=machine.gpus_per_node
    )
    print_line(out, escape(sentence))


def _print_routing(out: Console, result: TrainingFit) -> None:
    """Print what uneven routing makes of the fullest rank."""
    found = result.routing
    if found is None:
        return
    parts = [
        _("{size} in {share:.0%} of steps ({load:.2f} x the balanced rows)").format(
            size=format_bytes(one.device_used_bytes), share=one.share, load=one.load
        )
        for one in found.quantiles
    ]
    name = _("balanced by {way}").format(way=found.balancing) if found.balancing else _("as given")
    out.print(f"\n[bold]{_('Uneven routing')}[/bold]")
    balanced = _("balanced {size}; at most {parts}").format(
        size=format_bytes(found.balanced_bytes), parts=", ".join(parts)
    )
    model = _("experts' popularity of width {sigma:g}, {name}").format(sigma=found.sigma, name=name)
    print_line(out, f"{escape(balanced)}; {escape(model)}")


def _print_largest(out: Console, result: TrainingFit) -> None:
    """Print the largest micro-batch and the longest sequence, where they were looked for and exist."""
    found, job = result.largest, result.job
    lines = []
    if found and found.micro_batch_size:
        count = f"{found.micro_batch_size:,}" + ("" if found.micro_batch_surely else _(" or more"))
        lines.append(_("micro-batch {count} of {tokens:,} tokens").format(count=count, tokens=job.seq_len))
    if found and found.seq_len:
        tokens = f"{found.seq_len:,}" + ("" if found.seq_len_surely else _(" or more"))
        lines.append(
            _("sequences of {tokens} tokens at micro-batch {count:,}").format(tokens=tokens, count=job.micro_batch_size)
        )
    if lines:
        out.print(f"\n[bold]{_('Largest that fits')}[/bold]")
    for line in lines:
        print_line(out, escape(line))


def _plain_table(titles: tuple[str, ...]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for at, title in enumerate(titles):
        table.add_column(title, justify="right" if at >= len(titles) - 3 else "left")
    return table


def _print_advice(out: Console, result: TrainingFit) -> None:
    if not result.advice:
        return
    title = _("More room") if result.verdict == "fits" else _("Cheapest changes")
    out.print(f"\n[bold]{title}[/bold]")
    for item in result.advice[:ADVICE_SHOWN]:
        gives = _("{size} less on the fullest GPU, {verdict}").format(
            size=format_bytes(item.gain_bytes), verdict=verdict_word(item.verdict)
        )
        words = "; ".join(part for part in (item.cost, item.typed or item.flags) if part)
        typed = f"[dim]({escape(words)})[/dim]"
        print_line(out, f"[bold]{escape(item.change)}[/bold]: {escape(gives)} {typed}")
    if len(result.advice) > ADVICE_SHOWN:
        out.print("  " + _("{count} more with --json").format(count=len(result.advice) - ADVICE_SHOWN))
