"""The arguments of an operator by name, however they were given."""

from __future__ import annotations

from typing import Any


def arguments_of(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """Return every argument in the order of the operator's schema, defaults filled in."""
    schema = func._schema.arguments
    given = dict(zip((each.name for each in schema), args, strict=False)) | kwargs
    return {each.name: given.get(each.name, each.default_value) for each in schema}
