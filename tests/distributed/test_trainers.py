"""Trainers that others wrote (tests/trainers): over pycoll they learn what they learn over Gloo."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAMS = Path(__file__).parent.parent / "trainers"


@pytest.mark.parametrize("trainer", ("accelerate", "lightning"))
def test_learns_what_it_learns_over_gloo(trainer: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(trainer) is None:
        pytest.skip(f"{trainer} is not installed: pip install {trainer}")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    command = [sys.executable, *torchrun, str(PROGRAMS / f"with_{trainer}.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"reached-{rank}.json").read_text()) for rank in range(2))
    assert first["pycoll"] == second["pycoll"], "ranks agree"
    assert first["pycoll"] == pytest.approx(first["gloo"], rel=1e-5)
    assert first["pycoll"]["judged"] < 5, "it has learned: the variance of what it is to find is 8"
    if trainer == "accelerate":
        assert first["pycoll"]["examples"] == 203, "no example counts twice, though the last batches are uneven"
        assert (first["pycoll"]["mean"], first["pycoll"]["ranks"]) == (0.5, 2)
