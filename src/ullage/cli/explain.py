"""``ullage explain TERM [MODEL --on MACHINE]``: the formula of a term, its symbols, its source and its known error.

What stands in the docstrings of the formulas is what is shown; with a model, also the formula with its numbers.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterator
from pathlib import Path

from ullage.errors import EXIT_OK, InputError
from ullage.frozen import Frozen
from ullage.i18n import _

ROOT = Path(__file__).parents[1]
ROOMS = ("account", "engines")
#: Headings that make a docstring one of a formula.
HEADINGS = ("Formula:", "Symbols:", "Source:", "Known error:")


class Entry(Frozen):
    """A formula: where it stands and what its docstring says."""

    name: str
    place: str
    text: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument("term", nargs="?", metavar="TERM", help=_("such as weights or kv_cache; none: list them"))
    parser.add_argument("model", nargs="?", metavar="MODEL", help=_("also fill the formula in for this model"))
    parser.add_argument("--on", default="8xH200", metavar="MACHINE", help=_("the machine for MODEL (8xH200)"))
    parser.add_argument("--engine", default="vllm", metavar="NAME[@VERSION]", help=_("the engine for MODEL (vllm)"))
    parser.add_argument("--json", action="store_true", help=_("print JSON"))


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    found = list(entries())
    if arguments.term is None:
        _print_names(sorted({entry.name for entry in found}), as_json=arguments.json)
        return EXIT_OK
    chosen = matching(found, arguments.term)
    terms = _terms_of(arguments) if arguments.model else []
    if not chosen and not terms:
        from ullage.catalog import nearest

        names = nearest(arguments.term, sorted({entry.name for entry in found}))
        raise InputError(
            _("no formula is called {term!r}").format(term=arguments.term[:60]),
            remedy=_("nearest are {names}").format(names=", ".join(names)),
        )
    if arguments.json:
        from ullage.cli import print_json

        print_json({"term": arguments.term, "formulas": [vars(entry) for entry in chosen], "filled_in": terms})
        return EXIT_OK
    for number, entry in enumerate(chosen):
        print(("\n" if number else "") + f"{entry.name}  ({entry.place})\n")
        print("\n".join(f"  {line}" for line in entry.text.splitlines()))
    _print_terms(arguments, terms)
    return EXIT_OK


def _print_names(names: list[str], *, as_json: bool) -> None:
    if as_json:
        from ullage.cli import print_json

        print_json(names)
    else:
        print("\n".join(names))


def entries() -> Iterator[Entry]:
    """Yield every function whose docstring states a formula, without importing any."""
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            place = str(path.relative_to(ROOT.parent))
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                text = ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
                if text and "Formula:" in text and isinstance(node, ast.FunctionDef):
                    yield Entry(name=node.name.strip("_"), place=f"{place}:{node.lineno}", text=text)


def matching(found: list[Entry], term: str) -> list[Entry]:
    """Return the formulas of that name; else those whose name or file holds it."""
    key = term.strip().lower().replace("-", "_").replace(" ", "_")
    exact = [entry for entry in found if entry.name in (key, f"{key}_term", f"{key}_bytes")]
    if exact:
        return exact
    return [entry for entry in found if key in entry.name or f"/{key}.py" in entry.place]


def _terms_of(arguments: argparse.Namespace) -> list[dict[str, object]]:
    from ullage.fitting import fit_serving
    from ullage.read.machine import parse_machine
    from ullage.read.model_source import load_model
    from ullage.report.json import term_json
    from ullage.request import serving_job

    model = load_model(arguments.model, network=True)
    job = serving_job(model, parse_machine(arguments.on), engine=arguments.engine)
    result = fit_serving(job, advise=False)
    return [
        term_json(term)
        for term in result.ledger.device_used.walk()
        if term.name == arguments.term and (term.formula or term.bytes)
    ]


def _print_terms(arguments: argparse.Namespace, terms: list[dict[str, object]]) -> None:
    if arguments.model and not terms:
        print(
            _("{model} has no term {term} on {machine}").format(
                model=arguments.model, term=arguments.term, machine=arguments.on
            ),
            file=sys.stderr,
        )
    from ullage.units import format_bytes

    for term in terms:
        sizes = [format_bytes(int(str(term[key]))) for key in ("bytes", "low_bytes", "high_bytes")]
        print(
            "\n"
            + _("{model} on {machine}: {name} = {size} ({low} to {high}), {certainty}").format(
                model=arguments.model,
                machine=arguments.on,
                name=term["name"],
                size=sizes[0],
                low=sizes[1],
                high=sizes[2],
                certainty=term["certainty"],
            )
        )
        print(f"  {term['formula']}\n  {_('source')}: {term['source']}")
        for child in term["children"]:  # type: ignore[attr-defined]
            print(f"  {child['name']:<28} {format_bytes(child['bytes']):>12}  {child['formula']}")
