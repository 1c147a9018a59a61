"""Which settings a sweep varies: lists on the command line, and the files of configs/series/.

A file holds one or both of

    grid: {k: [0.5, 0.1], lr: [0.1, 0.01]}     # every combination
    list: [{lr: 0.1, wd: 5e-4}, {lr: 0.01, wd: 1e-4}]     # values that belong together
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import TypeAdapter, ValidationError

from bip.cli import nearest
from bip.config import RunConfig, about, known_keys, paths
from bip.errors import UserError
from bip.shipped import given_or_shipped, shipped
from bip.yaml_file import read_yaml

# The settings that have a flag of their own for their lists.
AXES = {"k": "series", "seed": "seeds", "arch": "archs"}
AXES |= {"layer_type": "layer_types", "trainer": "trainers"}
_FIXED = {"exp_mode": "give --stages", "budget": "give each its own --exp-name"}
_FILES = Path("configs", "series")


@dataclass(frozen=True)
class Grid:
    """`lists` are multiplied; each of `pairs` gives several settings together."""

    lists: dict[str, list[Any]] = field(default_factory=dict)
    pairs: list[dict[str, Any]] = field(default_factory=list)

    @property
    def keys(self) -> list[str]:
        return list(dict.fromkeys([*self.lists, *(key for pair in self.pairs for key in pair)]))


def split_lists(argv: list[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Take the comma lists of single settings (`--lr 0.1,0.01`) out of a command line.

    Returns it with the first value of each list, and all values by key. A list of an axis becomes
    that of its own flag (`--seed 1,2`: `--seeds 1,2`).
    """
    words, lists = [*argv], dict[str, list[str]]()
    for at, word in enumerate(argv):
        flag, is_one_word, value = word.partition("=")
        if not is_one_word:
            value = argv[at + 1] if at + 1 < len(argv) else ""
        key = _key(flag)
        if key is None or "," not in value or value.startswith("--"):
            continue
        if key in AXES:
            if {f"--{AXES[key]}", f"--{AXES[key].replace('_', '-')}"} & {*map(_flag, argv)}:
                raise UserError(f"{key}: --{AXES[key].replace('_', '-')} gives it too")
            words[at] = f"--{AXES[key].replace('_', '-')}" + (f"={value}" if is_one_word else "")
            continue
        lists[key] = [part.strip() for part in value.split(",")]
        words[at if is_one_word else at + 1] = (f"{flag}=" if is_one_word else "") + lists[key][0]
    return words, lists


def _flag(word: str) -> str:
    return word.partition("=")[0]


def _key(flag: str) -> str | None:
    """The setting that a flag names, if a comma in its value makes a list."""
    name = flag[2:].replace("-", "_") if flag.startswith("--") else ""
    name = "lr2" if name == "inv_gamma" else name
    if name not in RunConfig.model_fields:
        return None
    is_text = RunConfig.model_fields[name].annotation in (str, str | None)
    is_free_text = name in paths() or (is_text and about(name).choices is None)
    is_free_text |= name == "tracker"  # which is a list itself
    return None if is_free_text else name


def read_series(name: str) -> Grid | None:
    """The file that --series names, by its path or its name in configs/series/; None if no file.

    Raises UserError for one that is not readable or has an unknown key.
    """
    path = Path(name)
    if path.suffix not in (".yml", ".yaml"):
        path = _FILES / f"{name}.yml"
        if re.search(r"[\d,/]", name) or not (path.is_file() or shipped(str(path)).is_file()):
            return None
    path = given_or_shipped(path)
    content = read_yaml(path)
    if not content or not content.keys() <= {"grid", "list"}:
        raise UserError(f"{path}: must hold grid: (lists to multiply), list: (of settings) or both")
    lists, pairs = content.get("grid") or {}, content.get("list") or []
    if not isinstance(lists, dict) or not all(isinstance(v, list) and v for v in lists.values()):
        raise UserError(f"{path}: grid: must hold lists, such as lr: [0.1, 0.01]")
    if not isinstance(pairs, list) or not all(isinstance(pair, dict) and pair for pair in pairs):
        raise UserError(f"{path}: list: must hold settings, such as - {{lr: 0.1, wd: 5e-4}}")
    if len({frozenset(pair) for pair in pairs}) > 1:
        raise UserError(f"{path}: list: every entry needs the same keys")
    grid = Grid({_known(key, path): v for key, v in lists.items()},
                [{_known(key, path): v for key, v in pair.items()} for pair in pairs])  # fmt: skip
    if twice := grid.lists.keys() & {key for pair in pairs for key in pair}:
        raise UserError(f"{path}: {min(twice)} is in grid and in list; keep one of the two")
    if "trainer" in {key for pair in pairs for key in pair}:
        raise UserError(f"{path}: trainer: cannot be in list; give it in grid or as --trainers")
    return grid


def _known(key: Any, path: Path) -> str:
    name = "lr2" if key == "inv_gamma" else str(key)
    if name not in RunConfig.model_fields:
        raise UserError(f"{path}: unknown key {name!r}{nearest(name, known_keys())}")
    return name


def check(grid: Grid) -> None:
    """Raises UserError for a key that cannot vary, and a value that is invalid or given twice."""
    for key in grid.keys:
        if key in _FIXED:
            raise UserError(f"{key}: cannot vary in one sweep; {_FIXED[key]}")
        if not about(key).numbers:
            raise UserError(f"{key}: does not change results, so its values are the same run")
    for key, values in grid.lists.items():
        found = [_value(key, value) for value in values]
        if twice := [v for v, one in zip(values, found, strict=True) if found.count(one) > 1]:
            raise UserError(f"{key}: {twice[-1]} is given twice")
    pairs = [{key: _value(key, value) for key, value in pair.items()} for pair in grid.pairs]
    if twice := [pair for pair in pairs if pairs.count(pair) > 1]:
        raise UserError(f"series: {_text(twice[0])} is listed twice")


def _value(key: str, value: Any) -> Any:
    about_it = RunConfig.model_fields[key]
    kind: Any = about_it.annotation
    for part in about_it.metadata:
        kind = Annotated[kind, part]
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        raise UserError(f"{key}: {value!r}: {error.errors()[0]['msg'].lower()}") from None


def _text(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())
