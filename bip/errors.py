"""How a run ends when it does not finish."""


class UserError(Exception):
    """Bad input. The message is one line that names the key, file or record and what to do.

    Commands print it as ``error: MESSAGE`` on stderr and exit with code 2.
    """


class LostWorker(UserError):
    """A loader process died: for want of memory, or ended with its whole task.

    Who knows what became of the task decides whether that is final.
    """


class RankError(Exception):
    """Ranks disagree, or one is gone. The message names them.

    Commands print it as ``error: MESSAGE`` on stderr and exit with code 1 at once, so that the
    other processes of the step are ended too.
    """


class Stopped(Exception):
    """All ranks agreed to stop on a signal, and what could be saved is saved.

    `cause` names the signal; `step` is the iteration saved. Commands exit with code 75
    (EX_TEMPFAIL: try again); under SLURM the launcher requeues the task instead.
    """

    def __init__(self, cause: str, step: int) -> None:
        super().__init__(f"stopped by {cause} at step {step}; the same command goes on from there")
        self.cause = cause
        self.step = step
