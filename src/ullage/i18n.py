"""The one catalogue of user-facing strings.

Every sentence a user can read is marked with :func:`_` and extracted into ``locale/ullage.pot``; the English text is
the key. Sentences take their values with ``str.format`` names, never with f-strings, so that a translation can
reorder them: ``_("{what} must be positive").format(what=name)``.
"""

from __future__ import annotations

import gettext
from pathlib import Path

_LOCALE_DIR = Path(__file__).parent / "locale"
_translation = gettext.translation("ullage", localedir=_LOCALE_DIR, fallback=True)


def _(message: str) -> str:
    """Return ``message`` in the user's language (from ``LANGUAGE``, ``LC_ALL``, ``LC_MESSAGES``, ``LANG``)."""
    return _translation.gettext(message)
