"""Gradients side by side in memory that all ranks reach, averaged while the backward pass goes on.

csrc/README.md, "Gradient buckets", says what holds (B1 to B10): `bucket` is memory and the calls on it, `device_bucket`
those on a GPU, `passes` are backward passes as autograd runs them, `outcome` is what the last one has left, and
`gradient_buckets` decides when to make which call.
"""

from pycoll.buckets.bucket import WIRES, Bucket
from pycoll.buckets.gradient_buckets import GradientBuckets
from pycoll.buckets.measured import measured_squares
from pycoll.buckets.parts import ModelParts

__all__ = ["WIRES", "Bucket", "GradientBuckets", "ModelParts", "measured_squares"]
