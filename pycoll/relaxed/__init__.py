"""Training whose ranks do not wait for one another at every step.

`periodic`: ranks step alone and meet every so many steps (local SGD, DiLoCo). `parameter_server`: every rank serves a
part of the weights and works, and none is more than so many steps ahead of the slowest; its head says what holds.
"""

from pycoll.relaxed.parameter_server import ParameterServer
from pycoll.relaxed.periodic import DiLoCo, LocalSGD

__all__ = ["DiLoCo", "LocalSGD", "ParameterServer"]
