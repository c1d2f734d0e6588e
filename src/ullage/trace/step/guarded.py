"""A step that fails on meta tensors, said in one sentence: which operator, where, and what would be right."""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ullage.errors import InputError, UllageError
from ullage.i18n import _

#: Operators whose result has as many elements as the values say.
SIZED_BY_VALUES = frozenset(
    ("nonzero", "nonzero_static", "masked_select", "unique", "unique2", "_unique2", "unique_dim", "unique_consecutive",
     "repeat_interleave", "bincount", "histc")
)  # fmt: skip
#: Operators that hand a value to Python; so does copying to the host, whose sentence PyTorch begins so.
VALUE_WANTED, COPIED = frozenset(("_local_scalar_dense", "item", "equal", "is_nonzero")), "Cannot copy out of meta"
_NAMED = re.compile(r"(?:aten::|torch\.|Tensor\.)(\w+)(?=[.:(])")
#: Code whose frames are not the user's.
_OURS = (f"{os.sep}torch{os.sep}", f"{os.sep}ullage{os.sep}", "<frozen", "<string>")


def guarded(call: Callable[[], Any]) -> Any:
    """Run a step; say in one sentence what of it cannot run on meta tensors.

    Raises:
        InputError: an operator has no meta kernel, or a value was needed that is not there.
    """
    try:
        return call()
    except UllageError:
        raise
    except Exception as error:
        if os.environ.get("ULLAGE_DEBUG"):
            raise
        raise _said(error) from error


def _said(error: Exception) -> InputError:
    """Return the sentence for a step that failed."""
    name, place = _operator(error), _place(error)
    if name in SIZED_BY_VALUES:
        return InputError(
            _("{name} makes as many elements as its values say, and a trace has no values").format(name=name),
            where=place,
            remedy=_("use torch.where, or a fixed number of elements, in the traced step"),
        )
    if name in VALUE_WANTED or COPIED in str(error):
        return InputError(
            _("the step asks for the value of a tensor, and a trace has no values"),
            where=place,
            remedy=_("leave out item(), tolist(), numpy() and branches on tensors in the traced step"),
        )
    if isinstance(error, NotImplementedError):
        return InputError(
            _("{name} cannot run without a GPU: {why}").format(
                name=name or _("an operator"), why=_first_sentence(error)
            ),
            where=place,
            remedy=_("replace it in the traced step by one that has a meta kernel (torch.library.register_fake)"),
        )
    return InputError(
        _("the step failed on meta tensors: {kind}: {why}").format(
            kind=type(error).__name__, why=_first_sentence(error)
        ),
        where=place,
        remedy=_("set ULLAGE_DEBUG=1 to see where"),
    )


def _operator(error: Exception) -> str:
    """Return the operator that PyTorch's own sentence names, "" where it names none."""
    found = _NAMED.search(str(error))
    return found.group(1) if found else ""


def _place(error: Exception) -> str:
    """Return file and line of the user's own code that failed, "" where there is none."""
    found = [
        f"{Path(frame.f_code.co_filename).name}:{line}"
        for frame, line in traceback.walk_tb(error.__traceback__)
        if not any(part in frame.f_code.co_filename for part in _OURS)
    ]
    return found[-1] if found else ""


def _first_sentence(error: BaseException) -> str:
    return " ".join(str(error).split())[:240] or type(error).__name__
