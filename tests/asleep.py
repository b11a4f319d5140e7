"""Waits until a process waits."""

import time
from pathlib import Path

LONGEST = 20.0
"""Seconds after which it is given up."""


def until_asleep(pid: int) -> None:
    """Returns when the main thread of a process sleeps, as it does in a wait: seen so ten times in a row."""
    asleep, deadline = 0, time.monotonic() + LONGEST
    while asleep < 10:
        assert time.monotonic() < deadline, "it does not come to wait"
        time.sleep(0.03)
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        asleep = asleep + 1 if state == "S" else 0
