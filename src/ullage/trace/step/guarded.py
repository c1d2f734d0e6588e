"""A step that fails on meta tensors, said in one sentence."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from ullage.errors import InputError, UllageError
from ullage.i18n import _


def guarded(call: Callable[[], Any]) -> Any:
    """Run a step; say in one sentence what of it cannot run on meta tensors.

    Raises:
        InputError: an operator has no meta kernel, or a value was needed that is not there.
    """
    try:
        return call()
    except UllageError:
        raise
    except NotImplementedError as error:
        raise InputError(
            _("an operator cannot run without a GPU: {why}").format(why=_first_sentence(error)),
            remedy=_("replace it in the traced step by one that has a meta kernel (torch.library.register_fake)"),
        ) from error
    except Exception as error:
        if os.environ.get("ULLAGE_DEBUG"):
            raise
        raise InputError(
            _("the step failed on meta tensors: {kind}: {why}").format(
                kind=type(error).__name__, why=_first_sentence(error)
            ),
            remedy=_("set ULLAGE_DEBUG=1 to see where"),
        ) from error


def _first_sentence(error: BaseException) -> str:
    return " ".join(str(error).split())[:240] or type(error).__name__
