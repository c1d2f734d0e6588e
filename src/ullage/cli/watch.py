"""``ullage watch``: watch and record the memory of devices and processes."""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from ullage.cli.run import read_seconds
from ullage.errors import EXIT_OK, InputError
from ullage.i18n import _

if TYPE_CHECKING:
    from collections.abc import Callable

    from ullage.guard.watch.watcher import State, Watcher

_MIN_INTERVAL = 0.05


def _port(text: str) -> int:
    if not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(_("{text!r} is not a port").format(text=text[:40]))
    return int(text)


def _count(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 10**9:
        raise argparse.ArgumentTypeError(_("{text!r} is not a count").format(text=text[:40]))
    return int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument("--once", action="store_true", help=_("look once"))
    parser.add_argument("--json", action="store_true", help=_("print JSON; one line per look without --once"))
    parser.add_argument("--interval", type=read_seconds, default=2.0, metavar="TIME", help=_("between looks (2s)"))
    parser.add_argument("--samples", type=_count, metavar="N", help=_("stop after N looks"))
    parser.add_argument("--reserve", default="20%", metavar="SIZE", help=_("to keep free: 20%%, 8GiB (20%%)"))
    parser.add_argument("--counters", metavar="DIR", help=_("where jobs write PyTorch's counters"))
    group = parser.add_argument_group(_("recording"))
    group.add_argument("--record", metavar="FILE", help=_("write a recording (JSON lines)"))
    group.add_argument("--record-size", default="64MiB", metavar="SIZE", help=_("of one file, then the next (64MiB)"))
    group.add_argument("--record-files", type=_count, default=4, metavar="N", help=_("kept at most (4)"))
    group = parser.add_argument_group("Prometheus, Grafana")
    group.add_argument("--port", type=_port, metavar="N", help=_("serve /metrics; 0 takes a free port"))
    group.add_argument("--address", default="127.0.0.1", metavar="ADDRESS", help=_("to listen on (127.0.0.1)"))
    group.add_argument("--dashboard", action="store_true", help=_("print the dashboard for Grafana"))
    group.add_argument("--alerts", action="store_true", help=_("print the alarm rules for Prometheus"))
    group.add_argument("--minutes", type=_count, default=30, metavar="N", help=_("ahead that an alarm looks (30)"))


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    if arguments.dashboard:
        from ullage.guard.watch import grafana

        print((Path(next(iter(grafana.__path__))) / "dashboard.json").read_text(encoding="utf-8"), end="")
        return EXIT_OK
    if arguments.alerts:
        from ullage.guard.watch.alerts import alerts_yaml

        print(alerts_yaml(arguments.minutes), end="")
        return EXIT_OK
    return _watch(arguments)


def _watch(arguments: argparse.Namespace) -> int:
    from ullage.guard.watch.watcher import Watcher

    if arguments.interval < _MIN_INTERVAL:
        raise InputError(
            _("{seconds} s is too short").format(seconds=arguments.interval),
            where="--interval",
            remedy=_("write for example 1s"),
        )
    watcher = Watcher(reserve=arguments.reserve, counters=Path(arguments.counters) if arguments.counters else None)
    with ExitStack() as open_things:
        open_things.callback(watcher.close)
        first = watcher.look()
        for sample in first.samples:
            watcher.line.line_bytes(sample.device)
        if arguments.record:
            _record(watcher, first, arguments)
        if arguments.once:
            _show_once(first, as_json=arguments.json)
            return _ended(watcher, arguments)
        if arguments.port is not None:
            from ullage.guard.watch.endpoint import serve

            port, stop = serve(watcher.values, port=arguments.port, address=arguments.address)
            open_things.callback(stop)
            print(
                _("serving http://{address}:{port}/metrics").format(address=arguments.address, port=port),
                file=sys.stderr,
                flush=True,
            )
        _run(watcher, arguments, open_things)
    return _ended(watcher, arguments)


def _ended(watcher: Watcher, arguments: argparse.Namespace) -> int:
    """Say it when the recording could not be written to its end."""
    if watcher.recorder is not None and watcher.recorder.error:
        raise InputError(
            _("the recording ended early: {why}").format(why=watcher.recorder.error), where=arguments.record
        )
    return EXIT_OK


def _record(watcher: Watcher, first: State, arguments: argparse.Namespace) -> None:
    from ullage.guard.watch.record import Recorder
    from ullage.units import parse_size

    watcher.recorder = Recorder(
        arguments.record,
        [sample.device for sample in first.samples],
        max_bytes=max(4096, parse_size(arguments.record_size)),
        num_files=arguments.record_files,
        details={"interval_seconds": arguments.interval},
    )
    if arguments.once:
        watcher.recorder.samples(first.samples)


def _show_once(state: State, *, as_json: bool) -> None:
    from ullage.guard.watch.view import state_json, table

    if as_json:
        from ullage.cli import print_json

        print_json(state_json(state))
        return
    from rich.console import Console

    console = Console(highlight=False)
    console.print(table(state))
    if state.nvml_missing:
        console.print(_("no GPU is seen: {why}").format(why=state.nvml_missing), style="dim", markup=False)


def _run(watcher: Watcher, arguments: argparse.Namespace, open_things: ExitStack) -> None:
    import signal

    for number in (signal.SIGTERM, signal.SIGINT):
        before = signal.signal(number, lambda _number, _frame: watcher.stop())
        open_things.callback(signal.signal, number, before)
    show: Callable[[State], None]
    if arguments.json:
        show = _print_json_line
    elif sys.stdout.isatty():
        show = _live(open_things)
    else:
        show = _print_line
    watcher.run(arguments.interval, show, arguments.samples or 0)


def _print_json_line(state: State) -> None:
    import json

    from ullage.guard.watch.view import state_json

    print(json.dumps(state_json(state), ensure_ascii=False), flush=True)


def _print_line(state: State) -> None:
    from ullage.guard.watch.view import line_of

    print(line_of(state), flush=True)


def _live(open_things: ExitStack) -> Callable[[State], None]:
    from rich.live import Live

    from ullage.guard.watch.view import table

    live = open_things.enter_context(Live(auto_refresh=False))
    return lambda state: live.update(table(state), refresh=True)
