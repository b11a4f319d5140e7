"""Ctrl-C and its relatives: a request to stop that waits until the training step is done."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass
class StopRequest:
    """The last signal that asked this process to end; None while there was none."""

    received: signal.Signals | None = None


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Within the block, signals that ask the process to end are noted in the yielded object instead of obeyed.

    A terminal's Ctrl-C may reach a rank twice, directly and from the launcher: noting it twice does no harm.
    """
    request = StopRequest()

    def note(number: int, frame: FrameType | None) -> None:
        request.received = signal.Signals(number)

    previous = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
