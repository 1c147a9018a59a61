"""What differs between machines: limits of processes, and folders named by variables."""

import errno
import os
import re
import resource
import shlex
from collections.abc import Mapping

from bip.errors import UserError

_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})", re.ASCII)


def expanded(value: str, key: str, env: Mapping[str, str] = os.environ) -> str:
    """`value` with a leading ~ and every $NAME and ${NAME} replaced, as a shell does.

    For folders named in YAML files, which no shell has seen. Raises UserError naming `key` where a
    variable is not set or ~ names nobody.
    """

    def replaced(found: re.Match[str]) -> str:
        name = found[1] or found[2]
        if not env.get(name):
            raise UserError(f"{key}: {value}: {name} is not set on this machine; set it")
        return env[name]

    if os.path.exists(value):  # a folder of such a name
        return value
    if value.startswith("~"):
        home = env.get("HOME") if value[1:2] in ("", "/") else None
        value = home + value[1:] if home else os.path.expanduser(value)
        if value.startswith("~"):
            raise UserError(f"{key}: {value}: no such user, or no home folder; write it out")
    return _VARIABLE.sub(replaced, value)


def for_shell(value: str, key: str) -> str:
    """`value` for a shell script, which replaces ~ and variables where it runs, as `expanded`."""
    home = re.match("~(?=/|$)", value)
    if value.startswith("~") and not home:
        raise UserError(f"{key}: {value}: write the home folder of another user out")
    parts, at = ['"$HOME"'] if home else [], home.end() if home else 0
    for found in _VARIABLE.finditer(value):
        name = found[1] or found[2]
        parts += [shlex.quote(value[at : found.start()]) if found.start() > at else ""]
        parts += [f'"${{{name}:?{key} names it, but it is not set on this node}}"']
        at = found.end()
    return "".join(parts) + (shlex.quote(value[at:]) if at < len(value) or not parts else "")


def limit_reached(error: Exception) -> str | None:
    """Which limit of the system this is an error of, and how large it is; None if of none."""
    number, text = getattr(error, "errno", None), str(error)
    # Sending a file to another process fails without a number.
    if number == errno.EMFILE or "Too many open files" in text or "of ancdata" in text:
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return f"this process may have {soft} files open (ulimit -n)"
    if number == errno.ENFILE:
        return "this machine has too many files open (sysctl fs.file-max)"
    if number == errno.EAGAIN or "can't start new thread" in text:
        soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
        shown = "unlimited" if soft == resource.RLIM_INFINITY else soft
        return (
            f"no more processes or threads are allowed (ulimit -u is {shown}; a container or job "
            "may have a lower pids limit)"
        )
    if number == errno.ENOMEM or isinstance(error, MemoryError):
        return "memory is used up"
    return None
