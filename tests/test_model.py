"""The flag protocol, model-checked: each tests/model/*_model.cpp is a program that explores all that ranks may do."""

import subprocess
from pathlib import Path

import pytest
from compiled import HERE, SECONDS, Program

FLAGS = ("-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror")  # more optimization takes longer than it saves
MODELS = [Program("model", model, (), FLAGS) for model in sorted((HERE / "model").glob("*_model.cpp"))]
RUN_SECONDS = 120
pytestmark = pytest.mark.timeout(SECONDS + RUN_SECONDS)  # of which the compiler, beside others, may need most


@pytest.mark.parametrize("program", MODELS, ids=lambda model: model.main.stem)
def test_model(executable: Path) -> None:
    """No invariant is broken, and what is made wrong on purpose is found. Says how many states were explored (-rP)."""
    done = subprocess.run([executable], capture_output=True, text=True, timeout=RUN_SECONDS, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr
