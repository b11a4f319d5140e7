"""Where sums over many values are computed."""

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """`x` in fp32 where its own dtype has 16 bits, else itself."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
