"""One self-contained HTML file: the verdict first, then sections with text, tables and figures.

Nothing is fetched: style, script and plotly.js stand in the file, and its content policy forbids connections. All
values are escaped; figures are plain plotly dicts that the page gives its own colours, light or dark.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ullage.errors import MissingExtraError
from ullage.files import write_whole
from ullage.i18n import _

#: A page larger than this makes browsers slow; what is drawn is aggregated before (see figures.py).
MAX_PAGE_BYTES = 10_000_000
STATUSES = ("good", "warn", "bad", "")
#: An amount as the program prints it: with a sign, a unit, or a dash for none.
_NUMBER = re.compile(r"[-+~≤≥<>]?\s?\d[\d.,]*\s?(?:[KMGT]?i?B|%|×|x|s|ms|µs|/step)?(?:/step)?|–|")


@dataclass(frozen=True)
class Table:
    """A table: ``rows`` of values, as many in each as there are ``columns``."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""


@dataclass(frozen=True)
class Fact:
    """One figure on the first screen: a ``label``, a ``value``, and ``remark`` below it."""

    label: str
    value: str
    remark: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        text: paragraphs, parted by empty lines.
        figure: a plotly figure, or a plain ``{"data": [...], "layout": {...}}``.
        alt: what the figure shows, for those who do not see it.
        folded: shown closed, to be opened.
    """

    heading: str
    text: str = ""
    table: Table | None = None
    figure: Any = None
    alt: str = ""
    folded: bool = False


def write_page(
    path: str | Path,
    *,
    title: str,
    subtitle: str = "",
    sections: Sequence[Section] = (),
    lang: str = "en",
    status: str = "",
    facts: Sequence[Fact] = (),
    notes: Sequence[str] = (),
) -> None:
    """Write a page; the file is replaced when all of it is written.

    Args:
        path: the file.
        title: the verdict: the sentence that comes first.
        subtitle: what it is about.
        sections: in order.
        lang: language of the texts.
        status: ``good``, ``warn``, ``bad`` or nothing: the colour and sign of the verdict.
        facts: the figures that belong on the first screen.
        notes: warnings, below the facts.

    Raises:
        MissingExtraError: plotly or jinja2 is not installed.
        InputError: the file cannot be written.
    """
    text = render(title=title, subtitle=subtitle, sections=sections, lang=lang, status=status, facts=facts, notes=notes)
    write_whole(Path(path), text)


def render(
    *,
    title: str,
    subtitle: str = "",
    sections: Sequence[Section] = (),
    lang: str = "en",
    status: str = "",
    facts: Sequence[Fact] = (),
    notes: Sequence[str] = (),
) -> str:
    """Return a page as text (see :func:`write_page`)."""
    try:
        from jinja2 import Environment, PackageLoader
        from markupsafe import Markup
    except ImportError:
        raise MissingExtraError("jinja2", "html") from None

    from ullage import __version__

    room = Environment(
        loader=PackageLoader("ullage.report.html", "templates"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    figures = [None if one.figure is None else _plain_figure(one.figure) for one in sections]
    script = plotly_script() if any(figure is not None for figure in figures) else ""
    files = {name: room.loader.get_source(room, name)[0] for name in ("page.css", "page.js")}
    text: str = room.get_template("page.html").render(
        title=title,
        subtitle=subtitle,
        lang=lang,
        status=status if status in STATUSES else "",
        facts=facts,
        notes=notes,
        parts=[
            {
                "section": section,
                "paragraphs": [part for part in section.text.split("\n\n") if part.strip()],
                "numeric": _numeric_columns(section.table),
                "figure": Markup(script_json(figure)) if figure is not None else None,
            }
            for section, figure in zip(sections, figures, strict=True)
        ],
        style=Markup(files["page.css"]),
        script=Markup(files["page.js"]),
        plotly=Markup(script),
        words=_words(),
        version=__version__,
    )
    return text


def plotly_script() -> str:
    """Return the source of plotly.js."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise MissingExtraError("plotly", "html") from None
    source: str = get_plotlyjs()
    return source.replace("</script", "<\\/script")


def script_json(value: Any) -> str:
    """Return JSON that can stand inside a ``script`` element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _plain_figure(figure: Any) -> dict[str, Any]:
    """Return a figure as plain values."""
    if hasattr(figure, "to_plotly_json"):
        plain: dict[str, Any] = json.loads(figure.to_json())
        plain.get("layout", {}).pop("template", None)  # plotly's own theme: the page has one
        return plain
    return {"data": list(figure["data"]), "layout": dict(figure.get("layout", {}))}


def _numeric_columns(table: Table | None) -> list[bool]:
    """Tell for each column whether all its values are amounts: those stand at the right."""
    if table is None:
        return []
    return [
        all(_NUMBER.fullmatch(str(row[number]).strip()) for row in table.rows) for number in range(len(table.columns))
    ]


def _words() -> dict[str, str]:
    return {
        "skip": _("to the contents"),
        "theme": _("Light or dark"),
        "print": _("Print"),
        "contents": _("Contents"),
        "no_script": _("The figures need JavaScript; the tables hold the same numbers."),
        "made_by": _("written by ullage"),
        "figure": _("Figure"),
        "good": _("good"),
        "warn": _("attention"),
        "bad": _("bad"),
    }
