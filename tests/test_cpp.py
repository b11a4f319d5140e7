"""The C++ core under sanitizers: each tests/cpp/*_test.cpp, with the CPU executor and without torch, is a program."""

import os
import platform
import shlex
import signal
import subprocess
from pathlib import Path

import pytest
from compiled import CSRC, HERE, SECONDS, Program

TESTS = sorted((HERE / "cpp").glob("*_test.cpp"))
SOURCES = tuple(sorted((CSRC / "cpu").glob("*.cpp")))
FLAGS = "-std=c++20 -O1 -g1 -Wall -Wextra -Werror -ffp-contract=off -fno-math-errno -fno-omit-frame-pointer -pthread"
SANITIZERS = {
    "thread": "-fsanitize=thread",
    "address": "-fsanitize=address,undefined -fno-sanitize-recover=all",
    "none": "",
}
# Compilers do not vectorize what a sanitizer watches: the tests of SIMD loops run without one as well.
VECTORIZED = ("kernels_test", "combine_test", "adam_test", "bucket_test")
PROGRAMS = [
    Program(sanitizer, test, SOURCES, tuple(shlex.split(f"{FLAGS} {flags}")))
    for test in TESTS
    for sanitizer, flags in SANITIZERS.items()
    if sanitizer != "none" or test.stem in VECTORIZED
]
RUN_SECONDS = 180
# By themselves the first ones wait for the compiler, which a newly cloned repository keeps busy for minutes.
pytestmark = pytest.mark.timeout(3 * SECONDS + RUN_SECONDS)


@pytest.fixture(scope="session")
def fixed_addresses() -> list[str]:
    """How to start a program without address randomization: older ThreadSanitizers need that on newer kernels."""
    prefix = ["setarch", platform.machine(), "-R"]
    try:
        works = subprocess.run([*prefix, "true"], capture_output=True, timeout=60, check=False).returncode == 0
    except FileNotFoundError:
        works = False
    return prefix if works else []


@pytest.mark.parametrize("program", PROGRAMS, ids=str)
def test_program(program: Program, executable: Path, fixed_addresses: list[str], tmp_path: Path) -> None:
    """It makes its checks, and the sanitizer finds nothing."""
    command = [*(fixed_addresses if program.folder == "thread" else []), str(executable)]
    log = tmp_path / "output"
    # To a file, and in a session of its own: a child that outlives the program can neither keep a pipe open nor escape.
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status: int | str = process.wait(RUN_SECONDS)
        except subprocess.TimeoutExpired:
            status = f"still running after {RUN_SECONDS} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    assert status == 0, f"{shlex.join(command)}: {status}\n{log.read_text(errors='replace')[-8000:]}"
