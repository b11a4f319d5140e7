"""What `make cuda-link` runs with the CUDA torch: the extension loads, has CUDA in it, and names what is missing.

Argument: the folder that pycoll was built from. No GPU is visible, whatever the machine has.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

import pycoll
from pycoll import _C, _build


def main() -> None:
    """AssertionError where anything is not as it should be; else one line that says what was found."""
    assert Path(pycoll.__file__).is_relative_to(Path(sys.argv[1]).resolve()), f"another pycoll: {pycoll.__file__}"
    assert torch.version.cuda is not None, f"torch {torch.__version__} is a build without CUDA"
    assert not torch.cuda.is_available(), "a GPU is visible"
    assert _build.build_info()["cuda"]["built"], _build.summary()
    assert hasattr(_C, "LocalGroup"), "the extension holds nothing of CUDA"
    try:
        pycoll.LocalGroup(2)
    except pycoll.UnsupportedError as error:
        refusal = str(error)
    else:
        raise AssertionError("a group of ranks on a GPU, where there is none")
    x = torch.arange(5.0)
    with pycoll.Communicator(dist.HashStore(), 0, 1) as comm:
        comm.all_reduce(x)
    assert torch.equal(x, torch.arange(5.0)), x
    print(f"cuda-link: {_build.summary()}; imported without a GPU, of which it says: {refusal}")


if __name__ == "__main__":
    main()
