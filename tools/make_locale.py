"""Extract the user-facing sentences into ``src/ullage/locale/ullage.pot`` (needs babel).

python tools/make_locale.py          write it
python tools/make_locale.py --check  exit 1 when it is not up to date
"""

from __future__ import annotations

import sys
from io import BytesIO
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "src" / "ullage"
TEMPLATE = SOURCES / "locale" / "ullage.pot"


def template() -> bytes:
    """Return the template of the sources as they are: without dates and line numbers, so that it changes with words."""
    from babel.messages.catalog import Catalog
    from babel.messages.extract import extract_from_dir
    from babel.messages.pofile import write_po

    catalog = Catalog(project="ullage", version="", fuzzy=False, header_comment="# Sentences of ullage.")
    for file, _line, message, comments, _context in extract_from_dir(SOURCES, keywords={"_": None}):
        catalog.add(message, locations=[(f"src/ullage/{file}", 0)], auto_comments=comments)
    found = BytesIO()
    write_po(found, catalog, omit_header=True, include_lineno=False, sort_output=True, width=120)
    return found.getvalue()


def main() -> int:
    """Write or check the template."""
    text = template()
    if "--check" in sys.argv[1:]:
        return 0 if TEMPLATE.is_file() and TEMPLATE.read_bytes() == text else 1
    TEMPLATE.parent.mkdir(parents=True, exist_ok=True)
    TEMPLATE.write_bytes(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
