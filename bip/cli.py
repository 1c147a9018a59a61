"""The command line: flags of a pydantic model, commands as functions, errors of one line."""

import contextlib
import difflib
import inspect
import io
import os
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, TypedDict, Union, cast, get_args, get_origin

import tyro
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from bip.errors import ExitCode, RankError, UserError, outcome
from bip.machine import expanded


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
    """The field as tyro takes it. Choices are only listed for --help: listing may import torch."""
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
    an unknown flag or an invalid value, and SystemExit(0) for --help.
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
        for argument in argv:
            # An error that names a flag is about that flag, not about the file after it.
            is_stray = argument in str(error) and "--" not in str(error)
            if is_stray and argument.endswith((".yml", ".yaml")):
                raise UserError(
                    f"{argument}: a settings file is given as --configs {argument}"
                ) from None
        raise
    return {name: value for group in given.values() for name, value in group.items()}


Command = Callable[..., int | None]


def run(package: str, script: str, commands: Mapping[str, Command], argv: list[str]) -> int:
    """Run one of a program's commands; its exit code, by the table in `bip.errors`.

    Args:
        package: the program's name in `python -m PACKAGE`.
        script: the name of its console script.
        commands: by name; `argv[0]` is the name.
        argv: the arguments of the command line.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller: a file of ours would get its number
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal cannot show ends nothing
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        _check_folder()
        return call(commands, argv, program(package, script))
    except (Exception, KeyboardInterrupt) as error:
        found = outcome(error)
        if found is None:
            raise
        code, message = found
        if code == ExitCode.BROKEN_PIPE:  # else flushing at exit fails once more
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if message:
            print(message, file=sys.stderr, flush=True)
        if isinstance(error, RankError):
            os._exit(code)  # a normal exit may wait for a dead rank forever
        return code


def _check_folder() -> None:
    """Raise UserError if the current folder was removed: torch would end the process."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UserError("the current folder does not exist; cd into one that does") from None


def program(package: str, script: str) -> str:
    """The name that the program was called by."""
    return script if Path(sys.argv[0]).name == script else f"python -m {package}"


def call(commands: Mapping[str, Command], argv: list[str], prog: str) -> int:
    """Call the function that `argv[0]` names; return its exit code.

    The other arguments are its parameters: those without default by position or as flags, the
    others as flags, unless marked as `tyro.conf.Positional`. Keyword-only parameters are hidden
    from the user. A function of `*argv` gets the arguments unparsed. Raises UserError like
    `parse_flags`.
    """
    name, *rest = argv or [""]
    if name in ("", "-h", "--help"):
        print(_overview(commands, prog))
        return 0 if argv else ExitCode.USER
    if name not in commands:
        raise UserError(f"unknown command {name!r}{nearest(name, commands)}; see --help")
    command = commands[name]
    if any(p.kind is p.VAR_POSITIONAL for p in inspect.signature(command).parameters.values()):
        return command(*rest) or 0
    with _one_line_errors():
        parameters: Any = tyro.cli(_parameters(command, rest), args=rest, prog=f"{prog} {name}")
    for name, value in parameters.items():
        if isinstance(value, Path):
            parameters[name] = Path(expanded(str(value), name))
    return command(**parameters) or 0


def _doc(command: Command) -> str:
    return inspect.getdoc(getattr(command, "func", command)) or ""  # a partial has `func`


def _overview(commands: Mapping[str, Command], prog: str) -> str:
    width = max(map(len, commands))
    lines = [f"  {name:{width}}  {_doc(c).splitlines()[0]}" for name, c in commands.items()]
    usage = f"usage: {prog} COMMAND ..."
    return "\n".join([usage, "", *lines, "", f"{prog} COMMAND --help shows its options"])


def _parameters(command: Command, arguments: list[str]) -> Callable[..., dict[str, Any]]:
    """A function with the signature that tyro parses; it returns its arguments."""

    def given(**values: Any) -> dict[str, Any]:
        return values

    flags = {a.split("=")[0][2:].replace("-", "_") for a in arguments if a.startswith("--")}
    signature, positional = inspect.signature(command), cast(Any, tyro.conf.Positional)
    parameters = []
    for p in signature.parameters.values():
        if p.kind is p.KEYWORD_ONLY:
            continue
        if p.default is p.empty:
            kind = p.annotation if p.name in flags else positional[p.annotation]
            name = tyro.conf.arg(metavar=p.name.upper())
            p = p.replace(annotation=Annotated[kind, name])
        parameters.append(p)
    function: Any = given
    function.__doc__ = _doc(command).split("\n\nRaises:")[0]
    function.__signature__ = signature.replace(parameters=parameters, return_annotation=dict)
    function.__annotations__ = {p.name: p.annotation for p in parameters}
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
