"""Command-line flags of a pydantic model: only what was given, and errors of one line."""

import contextlib
import difflib
import io
import types
from collections.abc import Iterable
from decimal import Decimal
from typing import Annotated, Any, TypedDict, Union, get_args, get_origin

import tyro
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from bip.errors import UserError


def _flag_type(field: FieldInfo) -> Any:
    """The type that tyro parses: `X | None` is X (leave the flag out for None), Decimal is text."""
    kind: Any = field.annotation
    if get_origin(kind) in (Union, types.UnionType):
        kind = next(part for part in get_args(kind) if part is not type(None))
    return str if kind is Decimal else kind


def _aliases(name: str, field: FieldInfo) -> list[str] | None:
    choices = getattr(field.validation_alias, "choices", [])
    return [f"--{other.replace('_', '-')}" for other in choices if other != name] or None


def _default(field: FieldInfo) -> str:
    return "" if field.is_required() or field.default is None else f"(default: {field.default})"


def parse_flags(
    models: Iterable[type[BaseModel]], argv: list[str], prog: str, description: str
) -> dict[str, Any]:
    """The flags that `argv` gives, by field name; a flag left out is absent from the result.

    Every field of every model is a flag, in hyphen and underscore spelling. Raises UserError
    (one line, with the nearest right name) for an unknown flag or an unreadable value, and
    SystemExit(0) for --help.
    """
    fields = {
        name: Annotated[
            _flag_type(field),
            tyro.conf.arg(
                help=field.description or "",
                help_behavior_hint=_default(field),
                aliases=_aliases(name, field),
            ),
        ]
        for model in models
        for name, field in model.model_fields.items()
    }
    flags: Any = TypedDict("flags", fields, total=False)  # type: ignore[misc]
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            given: Any = tyro.cli(flags, args=argv, prog=prog, description=description)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(_unbox(printed.getvalue())) from None
    return dict(given)


def _unbox(box: str) -> str:
    """The first paragraphs of tyro's error box as one line."""
    lines = [line.strip("│ ").strip() for line in box.splitlines()[1:]]
    text = " ".join(line for line in lines if line and not set(line) <= set("─╰╯"))
    for tail in ("For full helptext", "Argument helptext"):
        text = text.split(tail)[0]
    return " ".join(text.split()) or "the command line could not be read"


def nearest(name: str, known: Iterable[str]) -> str:
    """' (perhaps you meant X)' for the closest known name, or nothing."""
    found = difflib.get_close_matches(name, list(known), n=1)
    return f" (perhaps you meant {found[0]})" if found else ""


def one_line(error: ValidationError, known: Iterable[str], where: str = "") -> UserError:
    """The first problem of a pydantic error as a UserError that names the key."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        text = f"unknown key {key!r}{nearest(key, known)}"
    elif first["type"] == "missing":
        text = f"{key}: missing; give it in the file or as --{key.replace('_', '-')}"
    else:
        message = first["msg"].removeprefix("Value error, ")
        value = "" if isinstance(first["input"], dict) else f", not {first['input']!r}"
        text = f"{key}: {message}{value}" if key else message
    return UserError(f"{where}: {text}" if where else text)
