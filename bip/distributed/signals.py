"""A scheduler's signal to stop: recorded at once, acted on when all ranks agree.

Imports no torch, so that a launcher can install the handlers before its slow imports.
"""

import signal
from types import FrameType

from bip.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGUSR2)


class StopRequest:
    """Set by the first SIGTERM or SIGUSR2 and never cleared. Handlers do nothing else.

    Saving inside a handler would run on one rank while the others wait in a collective.
    """

    def __init__(self) -> None:
        self.signal: int = 0

    def install(self) -> "StopRequest":
        """Install the handlers in this process. Call it from the main thread."""
        for number in SIGNALS:
            signal.signal(number, self._note)
        return self

    def raise_if_set(self) -> None:
        """Raises Stopped at step 0, as training has not started."""
        if self.signal:
            raise Stopped(signal_name(self.signal), 0)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.signal = self.signal or number


def signal_name(number: int) -> str:
    """SIGTERM, SIGUSR2."""
    return signal.Signals(number).name
