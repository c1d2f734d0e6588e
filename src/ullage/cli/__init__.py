"""The ``ullage`` command: one file per subcommand, loaded only when it is asked for.

A command module offers ``add_arguments(parser)`` and ``run(arguments) -> exit code``.
"""

from __future__ import annotations

import argparse
import errno
import gc
import os
import sys
from importlib import import_module
from typing import Any, NoReturn

from ullage.errors import EXIT_INTERNAL, EXIT_OK, UllageError
from ullage.i18n import _

EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141
#: command -> (module, help)
COMMANDS = {
    "fit": ("ullage.cli.fit", _("does this job fit on these GPUs?")),
    "models": ("ullage.cli.models", _("list the models known by name, or count the parameters of one")),
    "gpus": ("ullage.cli.gpus", _("list the GPUs known by name")),
    "engines": ("ullage.cli.engines", _("list the engines and the versions that are mirrored")),
    "explain": ("ullage.cli.explain", _("show the formula, the source and the known error of a term")),
    "inspect": ("ullage.cli.inspect", _("why did it die, where is the memory, and which change is cheapest?")),
    "replay": ("ullage.cli.replay", _("replay a recorded run of PyTorch, also under other allocator settings")),
    "trace": ("ullage.cli.trace", _("the memory of your own module or model, step by step, without a GPU")),
    "run": ("ullage.cli.run", _("run a command, and restart it with a smaller plan when it dies of memory")),
    "watch": ("ullage.cli.watch", _("watch and record the memory of devices and processes")),
    "bench": ("ullage.cli.bench", _("what this machine really takes: idle, full load, changing load")),
    "calibrate": ("ullage.cli.calibrate", _("measure on your own GPUs what is only modelled")),
    "validate": ("ullage.cli.validate", _("judge the predictions by measured runs")),
    "schema": ("ullage.cli.schema", _("print the JSON Schema of an output")),
    "doctor": ("ullage.cli.doctor", _("show what this installation can do")),
}


class Formatter(argparse.RawDescriptionHelpFormatter):
    """The usual help, without loading the archive formats that argparse drags in to learn the terminal's width."""

    def __init__(self, prog: str) -> None:
        try:
            width = int(os.environ.get("COLUMNS") or os.get_terminal_size().columns)
        except (OSError, ValueError):
            width = 80
        super().__init__(prog, width=max(40, width - 2))


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one sentence."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the whole usage."""
        from ullage.cli.words import usage_error

        raise usage_error(self, message)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, and name the nearest option where one is not known."""
        found, extras = self.parse_known_args(args, namespace)
        if extras:
            from ullage.cli.words import unknown_argument

            raise unknown_argument(self, extras)
        return found


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # bars and ticks where a terminal has only ASCII
    try:
        code = _dispatch(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
        return code
    except UllageError as error:
        return _say(str(error), error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains at its end
        return EXIT_BROKEN_PIPE
    except KeyboardInterrupt:
        return _say(_("interrupted"), EXIT_INTERRUPTED)
    except SystemExit as leave:  # argparse after --help, and rich where a pipe was closed
        if isinstance(leave.__context__, BrokenPipeError):
            return EXIT_BROKEN_PIPE
        return leave.code if isinstance(leave.code, int) else EXIT_OK
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EIO, errno.EDQUOT):
            return _bug(error)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _say(_("the answer could not be written ({reason})").format(reason=error.strerror), EXIT_INTERNAL)
    except Exception as error:
        return _bug(error)


def _bug(error: Exception) -> int:
    if os.environ.get("ULLAGE_DEBUG"):
        raise error
    what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return _say(
        _("internal error: {what}; set ULLAGE_DEBUG=1 to see where, and please report it").format(what=what),
        EXIT_INTERNAL,
    )


def _say(sentence: str, code: int) -> int:
    print(f"ullage: {sentence}", file=sys.stderr)
    return code


def _dispatch(argv: list[str]) -> int:
    command = next((word for word in argv if not word.startswith("-")), None)
    if command is not None and argv[0] == command and command in COMMANDS:
        if command == "fit":
            gc.disable()  # one short answer: looking for cycles costs more than it frees
        module_name, words, name = COMMANDS[command][0], argv[1:], command
        if command == "fit" and words[:1] == ["train"]:
            module_name, words, name = "ullage.cli.fit_train", words[1:], "fit train"
        module = import_module(module_name)
        parser = Parser(
            prog=f"ullage {name}", description=COMMANDS[command][1], formatter_class=Formatter, allow_abbrev=False
        )
        module.add_arguments(parser)
        whole = words.index("fit") if command == "explain" and "fit" in words[1:] else len(words)
        arguments = parser.parse_args(words[:whole])
        arguments.words = words
        if whole < len(words):
            arguments.fit = words[whole + 1 :]
        code: int = module.run(arguments)
        return code
    parser = _top_parser()
    parser.parse_args(argv)
    parser.print_help()
    return EXIT_OK


def _top_parser() -> Parser:
    from ullage import __version__

    commands = "\n".join(f"  {name:<10} {text}" for name, (_module, text) in COMMANDS.items())
    parser = Parser(
        prog="ullage",
        description=_("Where the GPU memory of a large model goes, and whether the job fits."),
        epilog=_("commands:\n{commands}\n\nexample:\n  ullage fit serve deepseek-v3 --on 8xH200").format(
            commands=commands
        ),
        formatter_class=Formatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"ullage {__version__}")
    parser.add_argument("command", nargs="?", choices=list(COMMANDS), metavar="COMMAND", help=_("see below"))
    return parser


def print_json(value: object) -> None:
    """Print a value as JSON on stdout."""
    import json

    print(json.dumps(value, indent=2, ensure_ascii=False))
