"""The errors pycoll raises. Each says what to do; an error of a collective is terminal for its communicator."""

import builtins


class Error(RuntimeError):
    """Base of all pycoll errors. `rank` is the rank to blame, where there is one."""

    rank: int | None = None


class UsageError(Error, ValueError):
    """A bad argument of this rank alone. The communicator stays usable."""


class UnsupportedError(Error, NotImplementedError):
    """Something pycoll does not do: a device, a layout, a dtype, a collective, a machine."""


class MismatchError(Error):
    """Ranks made different calls. The text says which rank called what."""


class PeerLostError(Error, ConnectionError):
    """A rank died, or closed its communicator while others still wait for it. `rank` names it."""


class TimeoutError(Error, builtins.TimeoutError):
    """A rank did not come in time. `rank` names it; None if who waits, or is waited for, receives from any rank."""
