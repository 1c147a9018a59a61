"""The methods: one file each, found by listing this folder.

A method's file declares all that the rest of the program needs to know about it (`base.Method`).
No file here imports torch at its top, so that the launcher plans without torch.
"""

import pkgutil
from functools import cache
from importlib import import_module

from bip.cli import nearest
from bip.methods.base import Method


@cache
def methods() -> dict[str, type[Method]]:
    """Every method by its name."""
    found: dict[str, type[Method]] = {}
    for module in pkgutil.iter_modules(__path__):
        for value in vars(import_module(f"{__name__}.{module.name}")).values():
            if isinstance(value, type) and issubclass(value, Method) and "name" in vars(value):
                found[value.name] = value
    return found


@cache
def own_settings() -> frozenset[str]:
    """The settings that act in some methods only."""
    return frozenset().union(*(method.keys for method in methods().values()))


def acts_in(method: type[Method], key: str) -> bool:
    """Whether a setting acts in a method."""
    return key in method.keys or key not in own_settings()


def spellings() -> list[str]:
    """All that --trainer takes: the methods' names, then the published ones."""
    return list(dict.fromkeys([*methods(), *(m.trainer for m in methods().values())]))


def find(trainer: str, mode: str) -> type[Method]:
    """The method that `--trainer` names in a mode, by its own or its published name.

    Raises ValueError, with the right names, for an unknown one and for one of another mode.
    """
    named = [m for m in methods().values() if trainer in (m.name, m.trainer)]
    for method in named:
        if method.mode == mode:
            return method
    if named:
        right = ", ".join(name for name, m in methods().items() if m.mode == mode)
        raise ValueError(
            f"{trainer} is a method to {named[0].mode}, it cannot {mode}; give --trainer {right}"
        )
    known = spellings()
    raise ValueError(
        f"unknown method {trainer!r}{nearest(trainer, known)}; one of {', '.join(known)}"
    )
