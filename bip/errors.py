"""How a command ends when it does not finish: the exceptions, and the one table of exit codes.

For Python 3.8 (see `bip/slurm.py`).
"""

from __future__ import annotations

import errno
from enum import IntEnum


class UserError(Exception):
    """Bad input. The message is one line that names the key, file or record and what to do.

    Commands print it as ``error: MESSAGE`` on stderr and exit with `ExitCode.USER`.
    """


class LostWorker(UserError):
    """A loader process died: it lacked memory, or SLURM ended the whole task.

    `launch/slurm/events.py` decides, from what SLURM did to the task, whether the run is retried.
    """


class RankError(Exception):
    """Ranks disagree, or one has ended. The message names them.

    Commands print it as ``error: MESSAGE`` on stderr and exit with `ExitCode.FAILED` at once, so
    that the other ranks are ended too.
    """


class Stopped(Exception):
    """All ranks agreed to stop on a signal, after saving what there was to save.

    `cause` names the signal; `step` is the iteration saved. Commands exit with
    `ExitCode.STOPPED`; under SLURM the launcher requeues the task instead.
    """

    def __init__(self, cause: str, step: int) -> None:
        super().__init__(f"stopped by {cause} at step {step}; the same command resumes there")
        self.cause = cause
        self.step = step


class ExitCode(IntEnum):
    """Exit codes of `bip` and `launch`. Numbers of 64 to 78 are those of sysexits.h."""

    DONE = 0
    FAILED = 1  # a bug, a lost rank; a sweep with runs that are not done
    USER = 2  # bad input, which the user can fix
    UNREACHABLE = 74  # EX_IOERR: a file system is unreachable; try again
    STOPPED = 75  # EX_TEMPFAIL: stopped by a signal, and saved; the same command resumes
    INTERRUPTED = 130  # 128 + SIGINT: Ctrl-C
    BROKEN_PIPE = 141  # 128 + SIGPIPE: the reader of the output has ended, as in `| head`


def outcome(error: BaseException) -> tuple[ExitCode, str] | None:
    """The exit code of a command that raised `error`, and its message for stderr ("" for none).

    None for a bug, which needs its traceback.
    """
    from bip.files import may_pass  # here, as it imports this module

    if isinstance(error, UserError):
        return ExitCode.USER, f"error: {error}"
    if isinstance(error, RankError):
        return ExitCode.FAILED, f"error: {error}"
    if isinstance(error, Stopped):
        return ExitCode.STOPPED, str(error)
    if isinstance(error, KeyboardInterrupt):
        return ExitCode.INTERRUPTED, "interrupted"
    if isinstance(error, OSError) and error.errno == errno.EPIPE:
        return ExitCode.BROKEN_PIPE, ""
    if isinstance(error, OSError) and may_pass(error):
        return ExitCode.UNREACHABLE, f"error: {error}; try again"
    if isinstance(error, OSError) and error.errno in _REMEDIES:
        return ExitCode.USER, f"error: {error}; {_REMEDIES[error.errno]}"
    return None


_REMEDIES = {
    errno.ENOSPC: "free space on that disk, or use another folder",
    errno.EDQUOT: "your quota is used up: delete files, or use another folder",
    errno.EFBIG: "a limit on file sizes is reached (ulimit -f, or the file system's)",
    errno.EROFS: "the file system is read-only: use another folder",
    errno.EACCES: "you may not use it: change its mode, or use another folder",
    errno.EPERM: "the file system does not allow it: use another folder",
    errno.ENAMETOOLONG: "give a shorter name (exp_name, result_dir)",
    errno.EMFILE: "raise the number of open files (ulimit -n)",
    errno.ENFILE: "this machine has too many open files (sysctl fs.file-max)",
    errno.ELOOP: "symbolic links lead in a circle: remove one",
    errno.ENOMEM: "memory is used up: ask for more",
}
