"""How a run is asked to stop."""

import logging
import signal
import threading
from types import FrameType

logger = logging.getLogger("launch")

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


class StopRequest:
    """Set by SIGTERM, SIGINT and SIGUSR2 (Slurm's warning before its time limit); read at a step boundary.

    The handler does nothing but set a flag: a save inside it could run in the middle of an update. A second signal of
    the same kind acts as if there were no handler, so that Ctrl-C twice ends a run that hangs.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        # Signals can only be caught in the main thread; a run inside another one is stopped by its owner.
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._on_signal) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]  # what signal.signal returned
        self._previous = {}

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        signal.signal(number, signal.SIG_DFL)

    @property
    def is_set(self) -> bool:
        """Whether a signal came."""
        return self.name is not None
