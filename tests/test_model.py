"""The flag protocol, model-checked: each tests/model/*_model.cpp is a program that explores all that ranks may do."""

import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from test_cpp import BUILD, CSRC, digest, run_tool

MODELS = sorted((Path(__file__).parent / "model").glob("*_model.cpp"))
FLAGS = shlex.split("-std=c++20 -O1 -Wall -Wextra -Werror")  # more optimization takes longer than it saves
RUN_SECONDS = 120
pytestmark = pytest.mark.timeout(600 + RUN_SECONDS)  # of which the compiler, beside others, may need most


def build(compiler: list[str], model: Path) -> Path:
    """The program of a model, compiled anew where something has changed."""
    out = BUILD / "model" / model.stem
    depfile, key = out.with_suffix(".d"), out.with_suffix(".key")
    command = [*compiler, *FLAGS, f"-I{CSRC}", f"-I{BUILD.parent}", "-o", str(out), str(model)]

    def current() -> str:  # the compiler has listed the headers
        listed = depfile.read_text().replace("\\\n", " ").split()[1:] if depfile.exists() else []
        return digest(command, [Path(f) for f in listed])

    if not (out.exists() and key.exists() and key.read_text() == current()):
        out.parent.mkdir(parents=True, exist_ok=True)
        key.unlink(missing_ok=True)
        run_tool([*command, "-MMD", "-MF", str(depfile)])
        key.write_text(current())
    return out


@pytest.fixture(scope="module")
def programs() -> Iterator[dict[Path, Future[Path]]]:
    """All programs, which are built side by side."""
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    if not shutil.which(compiler[0]):
        pytest.skip(f"no C++ compiler: {compiler[0]!r} is not found (set CXX)")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {model: pool.submit(build, compiler, model) for model in MODELS}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.stem)
def test_model(programs: dict[Path, Future[Path]], model: Path) -> None:
    """No invariant is broken, and what is made wrong on purpose is found. Says how many states were explored (-rP)."""
    done = subprocess.run([programs[model].result()], capture_output=True, text=True, timeout=RUN_SECONDS, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr
