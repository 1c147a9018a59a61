"""How a setting of a run is declared: its type, bounds, default, help, group, where it acts.

The settings of one method stand in its file, as a class of `MethodSettings`; `bip.config` adds them
to RunConfig. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, Field, TypeAdapter, ValidationError

if TYPE_CHECKING:
    from bip.config import RunConfig

# The groups of --help
RUN, NETWORK, PRUNING, BILEVEL = "run", "network", "pruning", "two-level"
DATA, OPTIMIZATION, SPEED, REPORTS = "data", "optimization", "speed", "report"


def _decimal_as_written(value: Any) -> Any:
    """k keeps its decimal digits: 0.8 is eight tenths, not the nearest binary float."""
    try:
        return Decimal(str(value))
    except InvalidOperation:
        raise ValueError("must be a decimal number such as 0.05") from None


Fraction = Annotated[Decimal, BeforeValidator(_decimal_as_written)]
Positive = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
InputFile = Annotated[Path, "a file that the run reads"]
Schedule = Literal["cosine", "step"]


@dataclass(frozen=True)
class Setting:
    """What a field declares beside type, default and help.

    `numbers`: it changes the run's numbers, so it is part of the fingerprint.
    `idle`: the reason why it has no effect in a run, or None. (Where a method lists it in its
    `keys`, it has none in methods that do not.)
    `choices`: its values, for --help and errors, where the type does not list them.
    `before`: of a key that came after version 0.1, the value that this version worked by. At it
    the key is left out of the fingerprint, and settings recorded by version 0.1 mean it.
    """

    group: str
    numbers: bool = True
    idle: Callable[[Any], str | None] = lambda _config: None
    choices: Callable[[], Iterable[str]] | None = None
    before: Any = ...


def setting(
    group: str,
    default: Any,
    help: str,
    *,
    numbers: bool = True,
    idle: Callable[[Any], str | None] = lambda _config: None,
    choices: Callable[[], Iterable[str]] | None = None,
    before: Any = ...,
    **field: Any,
) -> Any:
    """A field. `...` as the default: it must be given. `idle` gets the RunConfig."""
    about = Setting(group, numbers, idle, choices, before)
    return Field(default, description=help, json_schema_extra={"setting": about}, **field)  # type: ignore[dict-item]


def is_true(value: Any) -> bool:
    """Whether a value as it is written (`yes`, `off`, True, None) switches something on."""
    try:
        return TypeAdapter(bool).validate_python(value)
    except ValidationError:
        return False


class MethodSettings(BaseModel):
    """Settings of one method, or of several that share them. RunConfig inherits all such classes,
    so the flag, YAML key, --help and errors of a setting come with its declaration.
    """

    @classmethod
    def of(cls, config: RunConfig) -> Self:
        """`config`, typed as what has these settings."""
        assert isinstance(config, cls)
        return config
