"""``ullage calibrate``: measure on your own GPUs what is only modelled, and keep it as a profile that fits then use."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ullage.errors import EXIT_OK
from ullage.files import write_whole
from ullage.i18n import _


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument("--name", metavar="NAME", help=_("of the profile (made of the GPU and torch's version)"))
    parser.add_argument("--out", type=Path, metavar="FILE", help=_("write it there instead of the user's folder"))
    parser.add_argument("--no-steps", action="store_true", help=_("leave the matrix of training steps out"))
    parser.add_argument("--no-uuid", action="store_true", help=_("do not note a hash of the device's UUID"))
    parser.add_argument("--records", type=Path, metavar="FILE", help=_("write the steps for ullage validate"))
    parser.add_argument("--json", action="store_true", help=_("print JSON (see ullage schema calibrate)"))


def run(arguments: argparse.Namespace) -> int:
    """Run the command; 2 where there is no CUDA device."""
    from ullage.bench.calibrate.profile import save_profile
    from ullage.bench.calibrate.run import calibrate
    from ullage.catalog.calibration import user_folder

    done = calibrate(arguments.name, say, steps=not arguments.no_steps, keep_uuid=not arguments.no_uuid)
    path = arguments.out or user_folder() / f"{done.profile['name']}.json"
    save_profile(path, done.profile)
    if arguments.records is not None:
        _write_records(arguments.records, done.records)
    if arguments.json:
        from ullage.cli import print_json

        print_json({"schema_version": 1, "path": str(path), **done.profile})
    else:
        from ullage.report.bench_calibrate import print_profile

        print_profile(done.profile, path)
    return EXIT_OK


def say(sentence: str) -> None:
    """Tell a person at a terminal what is under way."""
    if sys.stderr.isatty():
        print(f"ullage calibrate: {sentence}", file=sys.stderr)


def _write_records(path: Path, records: list[dict[str, object]]) -> None:
    import json

    lines = [json.dumps(record, ensure_ascii=False, sort_keys=True) for record in records]
    write_whole(path, "".join(line + "\n" for line in lines))
