"""Command-line flags of a pydantic model: only what was given, and errors of one line."""

import contextlib
import difflib
import inspect
import io
import types
from collections.abc import Callable, Iterable, Iterator
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


def _flag(name: str, field: FieldInfo, with_choices: bool) -> Any:
    """The field as tyro takes it. Its choices may cost an import, and only --help shows them."""
    choices = getattr(_setting(field), "choices", None) if with_choices else None
    arg = tyro.conf.arg(
        help=field.description or "",
        help_behavior_hint=_default(field),
        aliases=_aliases(name, field),
        metavar="{" + ",".join(choices()) + "}" if choices else None,
    )
    return Annotated[_flag_type(field), arg]


def _setting(field: FieldInfo) -> Any:
    extra = field.json_schema_extra
    return extra.get("setting") if isinstance(extra, dict) else None


def parse_flags(
    models: Iterable[type[BaseModel]], argv: list[str], prog: str, description: str
) -> dict[str, Any]:
    """The flags that `argv` gives, by field name; a flag left out is absent from the result.

    Every field of every model is a flag, in hyphen and underscore spelling; --help shows them in
    the groups that the fields name. Raises UserError (one line, with the nearest right name) for
    an unknown flag or an unreadable value, and SystemExit(0) for --help.
    """
    shows_help = not {"-h", "--help"}.isdisjoint(argv)
    groups: dict[str, dict[str, Any]] = {}
    for model in models:
        for name, field in model.model_fields.items():
            group = getattr(_setting(field), "group", model.__name__.removesuffix("Options"))
            groups.setdefault(group.lower(), {})[name] = _flag(name, field, shows_help)
    flags: Any = TypedDict(  # type: ignore[misc]
        "flags",
        {
            group: Annotated[TypedDict(group, fields, total=False), tyro.conf.OmitArgPrefixes]  # type: ignore[misc]
            for group, fields in groups.items()
        },
        total=False,
    )
    try:
        with _one_line_errors():
            given: Any = tyro.cli(flags, args=argv, prog=prog, description=description)
    except UserError as error:
        for word in argv:
            alone = word in str(error) and "--" not in str(error)  # not after a misspelled flag
            if alone and word.endswith((".yml", ".yaml")):
                raise UserError(f"{word}: a settings file is given as --configs {word}") from None
        raise
    return {name: value for group in given.values() for name, value in group.items()}


def call(commands: dict[str, Callable[..., None]], argv: list[str], prog: str) -> None:
    """Call the function that the first word of `argv` names, the other words its parameters.

    Parameters without default are given by position, the others as flags. Raises UserError like
    `parse_flags`.
    """
    if argv[:1] not in [[name] for name in commands] and argv[:1] not in (["-h"], ["--help"]):
        given = f"unknown command {argv[0]!r}{nearest(argv[0], commands)}" if argv else "no command"
        raise UserError(f"{prog}: {given}; one of {', '.join(commands)}")
    if argv[0] not in commands:
        tyro.extras.subcommand_cli_from_dict(commands, args=argv, prog=prog)
    command = commands[argv[0]]
    with _one_line_errors():
        parameters: Any = tyro.cli(
            _parameters(command), args=argv[1:], prog=f"{prog} {argv[0]}",
            description=(inspect.getdoc(command) or "").split("\n\nRaises:")[0],
            config=(tyro.conf.PositionalRequiredArgs,),
        )  # fmt: skip
    command(**parameters)


def _parameters(command: Callable[..., None]) -> Callable[..., dict[str, Any]]:
    """A function of the same signature that only returns what it was given."""

    def given(**values: Any) -> dict[str, Any]:
        return values

    shown: Any = given
    signature = inspect.signature(command)
    shown.__signature__ = signature
    shown.__annotations__ = {
        name: Annotated[parameter.annotation, tyro.conf.arg(metavar=name.upper())]
        if parameter.default is parameter.empty
        else parameter.annotation
        for name, parameter in signature.parameters.items()
    }
    return given


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """tyro prints an error as a box and exits; this makes it a UserError of one line."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            yield
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(_unbox(printed.getvalue())) from None


def _unbox(box: str) -> str:
    """The first paragraphs of tyro's error box as one line."""
    lines = [line.strip("│ ").strip() for line in box.splitlines()[1:]]
    text = " ".join(line for line in lines if line and not set(line) <= set("─╰╯-"))
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
