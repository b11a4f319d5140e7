"""The C++ core under sanitizers: each tests/cpp/*_test.cpp, with the CPU executor and without torch, is a program."""

import hashlib
import os
import platform
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TESTS = sorted((HERE / "cpp").glob("*_test.cpp"))
CSRC = HERE.parent / "csrc"
BUILD = HERE / "cpp" / "build"
FLAGS = shlex.split(
    "-std=c++20 -O1 -g1 -Wall -Wextra -Werror -ffp-contract=off -fno-math-errno -fno-omit-frame-pointer -pthread"
)
SANITIZERS = {
    "thread": ["-fsanitize=thread"],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "none": [],
}
# Compilers do not vectorize what a sanitizer watches: the tests of SIMD loops run without one as well.
VECTORIZED = ("kernels_test", "combine_test", "adam_test")
CASES = [(t, s) for t in TESTS for s in SANITIZERS if s != "none" or t.stem in VECTORIZED]
RUN_SECONDS = 180
BUILD_SECONDS = 600
# The first tests wait for the compiler, which a newly cloned repository keeps busy for minutes.
pytestmark = pytest.mark.timeout(3 * BUILD_SECONDS + RUN_SECONDS)


def digest(parts: list[str], files: list[Path]) -> str:
    """What a build product depends on, in one string."""
    sha = hashlib.sha256("\0".join(parts).encode())
    for file in files:
        sha.update(file.read_bytes() if file.exists() else b"missing")
    return sha.hexdigest()


def run_tool(command: list[str]) -> None:
    """Runs a compiler; the test fails with what it said."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS, check=False)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr[-8000:]}"


class Builder:
    """Compiles and links what has changed: beside each product lies a digest of its command and of its files."""

    def __init__(self, compiler: list[str], pool: ThreadPoolExecutor) -> None:
        self.compiler = compiler
        version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, timeout=60, check=True)
        self.version = version.stdout
        self.sources = sorted((CSRC / "cpu").glob("*.cpp"))
        wanted = dict.fromkeys((sanitizer, source) for test, sanitizer in CASES for source in [*self.sources, test])
        self.objects: dict[tuple[str, Path], Future[Path]] = {w: pool.submit(self.compile, *w) for w in wanted}

    def compile(self, sanitizer: str, source: Path) -> Path:
        out = BUILD / sanitizer / f"{source.stem}.o"
        command = [*self.compiler, *FLAGS, *SANITIZERS[sanitizer], f"-I{CSRC}", f"-I{HERE / 'cpp'}", "-c", str(source)]
        depfile, key = out.with_suffix(".d"), out.with_suffix(".key")

        def current() -> str:  # the compiler has listed the headers: "x.o: x.cpp a.h \<newline> b.h"
            listed = depfile.read_text().replace("\\\n", " ").split()[1:] if depfile.exists() else []
            return digest([self.version, *command], [Path(f) for f in listed])

        if not (out.exists() and key.exists() and key.read_text() == current()):
            out.parent.mkdir(parents=True, exist_ok=True)
            key.unlink(missing_ok=True)
            run_tool([*command, "-MMD", "-MF", str(depfile), "-o", str(out)])
            key.write_text(current())
        return out

    def program(self, test: Path, sanitizer: str) -> Path:
        objects = [self.objects[sanitizer, source].result() for source in [*self.sources, test]]
        out = BUILD / sanitizer / test.stem
        command = [*self.compiler, *SANITIZERS[sanitizer], "-pthread", *map(str, objects), "-o", str(out)]
        key, wanted = out.with_suffix(".linked"), digest([self.version, *command], objects)
        if not (out.exists() and key.exists() and key.read_text() == wanted):
            key.unlink(missing_ok=True)
            run_tool(command)
            key.write_text(wanted)
        return out


@pytest.fixture(scope="session")
def builder() -> Iterator[Builder]:
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    if not shutil.which(compiler[0]):
        pytest.skip(f"no C++ compiler: {compiler[0]!r} is not found (set CXX)")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield Builder(compiler, pool)
        pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="session")
def fixed_addresses() -> list[str]:
    """How to start a program without address randomization: older ThreadSanitizers need that on newer kernels."""
    prefix = ["setarch", platform.machine(), "-R"]
    try:
        works = subprocess.run([*prefix, "true"], capture_output=True, timeout=60, check=False).returncode == 0
    except FileNotFoundError:
        works = False
    return prefix if works else []


@pytest.mark.parametrize(("test", "sanitizer"), [pytest.param(t, s, id=f"{t.stem}-{s}") for t, s in CASES])
def test_program(builder: Builder, fixed_addresses: list[str], tmp_path: Path, test: Path, sanitizer: str) -> None:
    """The program makes its checks, and the sanitizer finds nothing."""
    program = builder.program(test, sanitizer)
    command = [*(fixed_addresses if sanitizer == "thread" else []), str(program)]
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
