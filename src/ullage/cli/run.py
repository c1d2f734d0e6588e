"""``ullage run [options] -- COMMAND``: run a command, and restart it with a smaller plan when it dies of memory."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ullage.errors import InputError
from ullage.files import cannot_write, write_whole
from ullage.i18n import _

if TYPE_CHECKING:
    from ullage.guard.run.report import RunReport
    from ullage.guard.run.supervisor import Options

_MAX_SECONDS = 30 * 24 * 3600.0


def read_seconds(text: str) -> float:
    """Read ``90``, ``90s``, ``15m`` or ``2h``."""
    number, unit = (text[:-1], text[-1]) if text[-1:] in ("s", "m", "h") else (text, "s")
    try:
        value = float(number) * {"s": 1, "m": 60, "h": 3600}[unit]
    except ValueError:
        value = -1.0
    if not 0 <= value <= _MAX_SECONDS:
        raise argparse.ArgumentTypeError(_("{text!r} is not a time (write 90s, 15m or 2h)").format(text=text[:40]))
    return value


def _count(text: str) -> int:
    if not text.isdigit() or int(text) > 1000:
        raise argparse.ArgumentTypeError(_("{text!r} is not a count from 0 to 1000").format(text=text[:40]))
    return int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND", help=_("what to run, as typed"))
    group = parser.add_argument_group(_("restarts"))
    group.add_argument("--max-restarts", type=_count, default=5, metavar="N", help=_("at most (5)"))
    group.add_argument(
        "--restart-on",
        default="memory,killed,stall",
        metavar="CAUSES",
        help=_("memory, killed, stall, crash, none (memory,killed,stall)"),
    )
    group.add_argument("--backoff", type=read_seconds, default=1.0, metavar="TIME", help=_("before a restart (1s)"))
    group.add_argument(
        "--grace", type=read_seconds, default=30.0, metavar="TIME", help=_("from SIGTERM to SIGKILL (30s)")
    )
    group.add_argument(
        "--stall-timeout", type=read_seconds, default=0.0, metavar="TIME", help=_("of silence that means stuck (never)")
    )
    group.add_argument(
        "--stall-signal", metavar="NAME", help=_("that makes the job write where it is, such as USR1 (faulthandler)")
    )
    group = parser.add_argument_group(_("the plan"))
    group.add_argument("--plan-store", metavar="FILE", help=_("keeps the plan between runs (a file of this run only)"))
    group.add_argument("--plan", metavar="KNOBS", help=_("the first plan, such as micro_batch=8,grad_accum=4"))
    group.add_argument("--job", metavar="FILE", help=_("a job file: what the ledger says when it cannot fit"))
    group.add_argument("--on", metavar="MACHINE", help=_("such as 8xH100 (the GPUs of this machine)"))
    group = parser.add_argument_group(_("watching"))
    group.add_argument(
        "--reserve", metavar="SIZE", help=_("warn when less is free: 20%%, 8GiB or 0 (20%%; engines: 0)")
    )
    group.add_argument("--interval", type=read_seconds, default=5.0, metavar="TIME", help=_("between samples (5s)"))
    group.add_argument("--record", metavar="FILE", help=_("write a recording of the memory"))
    group.add_argument("--json", "--report", metavar="FILE", dest="json", help=_("write the report as JSON"))


def run(arguments: argparse.Namespace) -> int:
    """Run the command; the exit code is its own in the end, or 3 when it cannot fit."""
    from ullage.guard.run.supervisor import Supervisor
    from ullage.report.run_text import report_lines

    if sys.platform == "win32":
        raise InputError(_("ullage run needs a POSIX system"))
    options = _options(arguments)
    if arguments.json:
        _check_writable(arguments.json)
    report = Supervisor(options, _say).run()
    if arguments.json:
        _write(arguments.json, report)
    lines = report_lines(report)
    if report.verdict == "not_started":
        _say(_not_started(options.command[0], report))
    elif report.verdict != "succeeded" or len(report.attempts) > 1:
        for line in lines:
            _say(line)
    return report.exit_code


def _options(arguments: argparse.Namespace) -> Options:
    from ullage.guard.run.needs import Known
    from ullage.guard.run.policy import parse_causes
    from ullage.guard.run.programs import engine_of
    from ullage.guard.run.shrink import parse_knobs
    from ullage.guard.run.supervisor import Options

    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    if not command or not command[0]:
        raise InputError(_("no command is given"), remedy=_("write ullage run -- torchrun train.py"))
    if any("\0" in word for word in command):
        raise InputError(_("the command holds a zero byte"))
    if arguments.interval < 0.05:
        raise InputError(_("{text} s is too short").format(text=arguments.interval), where="--interval")
    if arguments.on:
        from ullage.read.machine import parse_machine

        parse_machine(arguments.on)
    reserve = arguments.reserve
    if reserve is None:
        reserve = "" if engine_of(command) else "20%"
    return Options(
        command=tuple(command),
        plan_store=arguments.plan_store or "",
        knobs=tuple(parse_knobs(arguments.plan).items()) if arguments.plan else (),
        causes=parse_causes(arguments.restart_on),
        max_restarts=arguments.max_restarts,
        backoff_seconds=arguments.backoff,
        grace_seconds=arguments.grace,
        stall_seconds=arguments.stall_timeout,
        stall_signal=_signal(arguments.stall_signal),
        reserve=reserve,
        every_seconds=arguments.interval,
        record=arguments.record or "",
        known=Known(job_file=arguments.job or "", machine=arguments.on or ""),
    )


def _signal(name: str | None) -> int:
    import signal

    if not name:
        return 0
    try:
        return int(signal.Signals["SIG" + name.upper().removeprefix("SIG")])
    except KeyError:
        raise InputError(
            _("{name!r} is not the name of a signal").format(name=name[:40]),
            where="--stall-signal",
            remedy=_("write for example USR1"),
        ) from None


def _check_writable(name: str) -> None:
    try:
        with Path(name).open("a", encoding="utf-8"):
            pass
    except OSError as error:
        raise cannot_write(Path(name), error) from None


def _write(name: str, report: RunReport) -> None:
    import json

    from ullage.report.run_json import run_json

    try:
        write_whole(Path(name), json.dumps(run_json(report), indent=2, ensure_ascii=False) + "\n")
    except InputError as error:
        _say(_("the report is lost: {why}").format(why=error))


def _not_started(command: str, report: RunReport) -> str:
    import os

    error = os.strerror(report.attempts[-1].errno) if report.attempts else ""
    return _("{command}: {why}").format(command=command[:200], why=error)


def _say(sentence: str) -> None:
    print(f"ullage run: {sentence}", file=sys.stderr, flush=True)
