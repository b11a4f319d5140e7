"""What becomes of a process when the one that started it has died."""

import ctypes
import os
import signal


def end_with(parent: int, by: signal.Signals) -> bool:
    """From now on the kernel sends this process `by` when its parent, whose process is `parent`, ends.

    False if it has ended already. (The thread that started this process must not end before.)
    """
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, by)
    return os.getppid() == parent
