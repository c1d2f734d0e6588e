"""``ullage explain TERM [MODEL --on MACHINE | fit …]``: the formula of a term, its symbols, source and known error.

What stands in the docstrings of the formulas is what is shown; with a model or a whole fit, also the formula with its
numbers.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ullage.errors import EXIT_OK, InputError
from ullage.frozen import Frozen
from ullage.i18n import _

if TYPE_CHECKING:
    from ullage.ledger import Ledger

ROOT = Path(__file__).parents[1]
ROOMS = ("account", "engines")
#: Headings that make a docstring one of a formula.
HEADINGS = ("Formula:", "Symbols:", "Source:", "Known error:")
#: Formulas that are printed for one name.
MOST_SHOWN = 8
#: Words of the reports that are no terms of a ledger.
WORDS = {
    "free": _("Formula: what the device reports as its total - everything on it (device used)."),
    "need": _("Formula: everything on the device but the KV pool + the KV cache of the requests asked for."),
    "pool": _("What requests may take of a device: the engine's KV cache, or what a fixed one could grow to."),
    "allocated": _("What the tensors of PyTorch take, rounded by its allocator to 512 bytes."),
    "reserved": _("What PyTorch's allocator holds of the device: allocated + cached and split-off pieces."),
    "device_used": _("What the driver reports as used: reserved + context, NCCL, graphs and libraries beside PyTorch."),
}
_TERM = re.compile(r'\b(?:exact|ranged|total)\(\s*"([a-z_][\w.]*)"')
_FUNCTION = re.compile(r"^ *def (\w+)\((.*?)(?=^ *def |\Z)", re.MULTILINE | re.DOTALL)


class Entry(Frozen):
    """A formula: where it stands and what its docstring says."""

    name: str
    place: str
    text: str
    makes: bool = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.usage = (
        "ullage explain [TERM] [MODEL] [--on MACHINE] [--engine NAME] [--json]\n"
        "       ullage explain TERM fit serve|train MODEL --on MACHINE [options of the fit]"
    )
    parser.set_defaults(fit=None)
    parser.add_argument("term", nargs="?", metavar="TERM", help=_("such as weights or kv_cache; none: list them"))
    parser.add_argument("model", nargs="?", metavar="MODEL", help=_("also fill the formula in for this model"))
    parser.add_argument("--on", default="8xH200", metavar="MACHINE", help=_("the machine for MODEL (8xH200)"))
    parser.add_argument("--engine", default="vllm", metavar="NAME[@VERSION]", help=_("the engine for MODEL (vllm)"))
    parser.add_argument("--json", action="store_true", help=_("print JSON"))


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    if arguments.term is None:
        _print_names(known_names(), as_json=arguments.json)
        return EXIT_OK
    chosen = matching(arguments.term)
    asked = arguments.model is not None or arguments.fit is not None
    terms = _terms_of(arguments) if asked else []
    if not chosen and not terms:
        from ullage.catalog import nearest

        names = nearest(arguments.term, known_names())
        raise InputError(
            _("no term and no formula is called {term!r}").format(term=arguments.term[:60]),
            remedy=_("nearest are {names}").format(names=", ".join(names)),
        )
    if arguments.json or "--json" in (arguments.fit or ()):
        from ullage.cli import print_json

        print_json({"term": arguments.term, "formulas": [vars(entry) for entry in chosen], "filled_in": terms})
        return EXIT_OK
    _print_terms(arguments, terms)
    for number, entry in enumerate(chosen):
        print(("\n" if number or terms else "") + f"{entry.name}  ({entry.place})\n")
        print("\n".join(f"  {line}".rstrip() for line in entry.text.splitlines()))
    return EXIT_OK


def _print_names(names: list[str], *, as_json: bool) -> None:
    if as_json:
        from ullage.cli import print_json

        print_json(names)
    else:
        print("\n".join(names))


def _files() -> Iterator[tuple[str, str]]:
    """Yield place and text of every module of the formulas."""
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            yield str(path.relative_to(ROOT.parent)), path.read_text(encoding="utf-8")


def known_names() -> list[str]:
    """Return the names of terms and of formulas, found by their look: nothing is parsed, nothing imported."""
    found = set(WORDS)
    for _place, text in _files():
        found.update(name for name in _TERM.findall(text))
        found.update(name.strip("_") for name, body in _FUNCTION.findall(text) if "Formula:" in body)
    return sorted(found)


def matching(term: str) -> list[Entry]:
    """Return the formulas of that name; else those that make the term so called; else those of the file so called."""
    key = term.strip().lower().replace("-", "_").replace(" ", "_")
    if key in WORDS:
        return [Entry(name=key, place="docs/verdict.md", text=WORDS[key])]
    for part in (key, *_parts(key)):
        called = re.compile(rf'"{re.escape(part)}"|def _*{re.escape(part)}(_term|_bytes)?\(')
        found = list(entries(part, called))
        formulas = [entry for entry in found if "Formula:" in entry.text]
        chosen = (
            [entry for entry in formulas if entry.name in (part, f"{part}_term", f"{part}_bytes")]
            or [entry for entry in formulas if entry.makes]
            or [entry for entry in formulas if f"/{part}.py" in entry.place]
            or [entry for entry in found if entry.makes]
        )
        if chosen:
            return chosen[:MOST_SHOWN]
    return [
        entry for entry in entries(key, re.compile(re.escape(key))) if "Formula:" in entry.text and key in entry.name
    ][:MOST_SHOWN]


def _parts(key: str) -> Iterator[str]:
    """Yield what a name is put together of: ``reward_model_weights`` ends in weights, ``norm.input`` is of a norm."""
    if "." in key:
        yield from (key.partition(".")[0], key.rpartition(".")[2])
    elif key.endswith("_weights"):
        yield "weights"


def entries(key: str, hint: re.Pattern[str]) -> Iterator[Entry]:
    """Yield the functions with a formula, or that make a term so called, of the files that hold ``hint``."""
    for place, text in _files():
        if not hint.search(text) and f"/{key}.py" not in place:
            continue
        module = ast.parse(text)
        for node in ast.walk(module):
            if not isinstance(node, ast.FunctionDef):
                continue
            about = ast.get_docstring(node) or ""
            makes = any(isinstance(each, ast.Constant) and each.value == key for each in ast.walk(node))
            if makes or "Formula:" in about:
                text = about or ast.get_docstring(module) or ""
                yield Entry(name=node.name.strip("_"), place=f"{place}:{node.lineno}", text=text, makes=makes)


def _terms_of(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    from ullage.report.json import term_json

    ledger = _ledger_of_fit(arguments.fit) if arguments.fit is not None else _ledger_of_model(arguments)
    return [
        term_json(term)
        for term in ledger.device_used.walk()
        if term.name == arguments.term and (term.formula or term.bytes)
    ]


def _ledger_of_model(arguments: argparse.Namespace) -> Ledger:
    from ullage.fitting import fit_serving
    from ullage.read.machine import parse_machine
    from ullage.read.model_source import load_model
    from ullage.request import serving_job

    model = load_model(arguments.model, network=True)
    job = serving_job(model, parse_machine(arguments.on), engine=arguments.engine)
    return fit_serving(job, advise=False).ledger


def _ledger_of_fit(words: list[str]) -> Ledger:
    """Return the ledger of a fit as it is typed: ``serve MODEL --on …`` or ``train MODEL --on …``."""
    from ullage.cli import Parser, fit, fit_train
    from ullage.fitting import fit_serving
    from ullage.spec.training import TrainingJob
    from ullage.training_fit import fit_training

    train = words[:1] == ["train"]
    parser = Parser(prog="ullage fit train" if train else "ullage fit", allow_abbrev=False)
    (fit_train if train else fit).add_arguments(parser)
    arguments = parser.parse_args(words[1:] if train else words)
    job = fit_train.job_of(arguments) if train else fit.job_of(arguments)
    calibrated = not arguments.no_calibration
    if isinstance(job, TrainingJob):
        return fit_training(job, reserve=arguments.reserve, advise=False, calibrated=calibrated).ledger
    context, concurrency = arguments.context, arguments.concurrency
    return fit_serving(
        job, context=context, concurrency=concurrency, reserve=arguments.reserve, advise=False, calibrated=calibrated
    ).ledger


def _print_terms(arguments: argparse.Namespace, terms: list[dict[str, Any]]) -> None:
    if arguments.fit is not None:
        what = " ".join(["fit", *arguments.fit])
    else:
        what = _("{model} on {machine}").format(model=arguments.model, machine=arguments.on)
    if not terms and (arguments.model or arguments.fit is not None):
        print(_("{what} has no term {term}").format(what=what, term=arguments.term), file=sys.stderr)
    from ullage.units import format_bytes

    for number, term in enumerate(terms):
        sizes = [format_bytes(term[key]) for key in ("bytes", "low_bytes", "high_bytes")]
        print(
            ("\n" if number else "")
            + _("{what}: {name} = {size} ({low} to {high}), {certainty}").format(
                what=what, name=term["name"], size=sizes[0], low=sizes[1], high=sizes[2], certainty=term["certainty"]
            )
        )
        if term["formula"]:
            print(f"  {term['formula']}")
        children: list[dict[str, Any]] = term["children"]
        source = term["source"] or next((child["source"] for child in children if child["source"]), "")
        if source:
            print(f"  {_('source')}: {source}")
        for child in children:
            print(f"  {child['name']:<28} {format_bytes(child['bytes']):>12}  {child['formula']}".rstrip())
