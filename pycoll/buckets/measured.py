"""Finds what buckets have measured of gradients, for an optimizer that knows only the gradients."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pycoll.buckets.gradient_buckets import watching
from pycoll.errors import UsageError


def measured_squares(params: Sequence[Tensor]) -> Tensor | None:
    """The `squares` of the buckets that have averaged the gradients of exactly these parameters, if any have.

    Raises:
        UsageError: they are a part of a model, and nobody has measured the whole.
    """
    for buckets in list(watching):
        if buckets.everywhere and params and params[0] in buckets:
            measured = buckets.squares
            with_gradient = {param for param in buckets.params if param.grad is not None}
            if measured is not None and with_gradient == {*params} and buckets.hold(params):
                return measured
            if buckets.parts is not None:
                raise UsageError(
                    "pycoll: the norm of a model in parts is measured while gradients are averaged: clip before they "
                    "are changed, and all of them together"
                )
            return None
    return None
