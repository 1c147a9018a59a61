"""Reading YAML files strictly."""

import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from bip.errors import UserError
from bip.files import may_pass

# libyaml is eight times faster, which matters for the report of a thousand runs.
_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

_MERGE = "tag:yaml.org,2002:merge"


class Loader(_Base):  # type: ignore[misc]
    """SafeLoader that leaves numbers as they are written, for the settings' own types to read.

    YAML would make 83 of `0123`, 90 of `1:30`, 1.1 of `1.10` and true of `on`, also where a name is
    meant. Only null, true and false have types here. Refuses a key written twice, where YAML would
    silently keep the last.
    """

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  # declared so by PyYAML

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        own = (key for key, _ in node.value if key.tag != _MERGE)  # which may override what it adds
        keys = [self.construct_object(key, deep=True) for key in own]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise UserError(f"key {twice!r} is written twice")
        values: dict[Any, Any] = super().construct_mapping(node, deep)
        return values


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:null", re.compile(r"(~|null|Null|NULL|)$"), ["~", "n", "N", ""]
)
Loader.add_implicit_resolver(_MERGE, re.compile(r"<<$"), ["<"])


def refuse_leading_zeros(model: type[BaseModel], values: dict[str, Any]) -> None:
    """Raise ValueError for a number such as 0123, of which YAML readers make 83 or 123."""
    for name, value in values.items():
        if isinstance(value, str) and re.fullmatch(r"[-+]?0[0-9_]+", value):
            field = model.model_fields.get(name)
            if field is not None and "str" not in str(field.annotation):
                raise ValueError(f"{name}: a number without leading zeros is needed, not {value}")


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file's top-level mapping; numbers are text.

    Raises UserError naming the file, OSError if its file system is unreachable.
    """
    try:
        values = yaml.load(path.read_bytes(), Loader)  # UTF-8, whatever the locale
    except (OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and may_pass(error):
            raise
        raise UserError(f"{path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except RecursionError:
        raise UserError(f"{path}: not YAML: brackets nested too deeply") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(f"{path}: must hold 'key: value' lines")
    return values
