"""``ullage replay FILE``: what a recorded run did with its memory, and what it would need under other settings."""

from __future__ import annotations

import argparse
from pathlib import Path

from ullage.errors import EXIT_DOES_NOT_FIT, EXIT_OK
from ullage.i18n import _


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument("file", type=Path, metavar="FILE", help=_("a snapshot of torch.cuda.memory._dump_snapshot"))
    parser.add_argument("--device", type=int, metavar="N", help=_("this device (the one with most events)"))
    parser.add_argument(
        "--settings", metavar="CONF", help=_("run it under this PYTORCH_ALLOC_CONF instead of the recorded one")
    )
    parser.add_argument("--capacity", metavar="SIZE", help=_("what the driver can give to PyTorch, such as 80GiB"))
    parser.add_argument("--what-if", action="store_true", help=_("try other settings and rank them"))
    parser.add_argument("--torch", default="2.13", metavar="VERSION", help=_("the PyTorch of the settings (2.13)"))
    parser.add_argument("--json", action="store_true", help=_("print JSON"))


def run(arguments: argparse.Namespace) -> int:
    """Run the command; 3 when the run dies under the capacity given."""
    from ullage.allocator.session import choose_device, replay_device
    from ullage.allocator.settings import parse_settings, parse_version
    from ullage.cli import print_json
    from ullage.observe.snapshot import read_snapshot
    from ullage.observe.stages import Stages
    from ullage.report.replay import print_replay, replay_json
    from ullage.units import parse_size

    version = parse_version(arguments.torch)
    settings = None if arguments.settings is None else parse_settings(arguments.settings, version=version)
    capacity = None if arguments.capacity is None else parse_size(arguments.capacity)
    with Stages() as stages:
        snapshot = read_snapshot(arguments.file, progress=stages.reading)
        device, notes = choose_device(snapshot, arguments.device)
        replay = replay_device(
            snapshot,
            device,
            settings=settings,
            capacity_bytes=capacity,
            what_if=arguments.what_if,
            version=version,
            stage=stages,
        )
    replay.warnings = [*notes, *replay.warnings]
    if arguments.json:
        print_json(replay_json(replay))
    else:
        print_replay(replay)
    return EXIT_DOES_NOT_FIT if replay.death is not None else EXIT_OK
