"""C++ programs that tests run, compiled in the background: what they wait for, other tests have time for."""

import hashlib
import os
import shlex
import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from subprocess import run

HERE = Path(__file__).parent
CSRC = HERE.parent / "csrc"
BUILD = HERE / "cpp" / "build"
COMPILER = shlex.split(os.environ.get("CXX", "g++"))
SECONDS = 600
# Other tests, which go on beside it, put others in the place of subprocess.run and of PATH.
ENVIRON = dict(os.environ)


def missing() -> str | None:
    """Why nothing can be compiled here."""
    return None if shutil.which(COMPILER[0]) else f"no C++ compiler: {COMPILER[0]!r} is not found (set CXX)"


@dataclass(frozen=True)
class Program:
    """What it is made of, and how. In `folder`, a subfolder of BUILD, all is compiled with the same flags."""

    folder: str
    main: Path
    others: tuple[Path, ...]
    flags: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.main.stem}-{self.folder}"


class Compiled:
    """Programs on the way; what has not changed is not made again: beside each product lies a digest of its making."""

    def __init__(self, programs: Sequence[Program], pool: ThreadPoolExecutor) -> None:
        sources = {(p.folder, source): p.flags for p in programs for source in (*p.others, p.main)}
        objects = {key: pool.submit(self._compile, *key, flags) for key, flags in sources.items()}
        self._programs = {
            p: pool.submit(self._link, p, [objects[p.folder, source] for source in (*p.others, p.main)])
            for p in programs
        }

    def path(self, program: Program) -> Path:
        """Waits for it, and fails with what the compiler said."""
        return self._programs[program].result()

    def _compile(self, folder: str, source: Path, flags: Sequence[str]) -> Path:
        out = BUILD / folder / f"{source.stem}.o"
        command = [*COMPILER, *flags, f"-I{CSRC}", f"-I{HERE / 'cpp'}", "-c", str(source), "-o", str(out)]
        listed = out.with_suffix(".d")  # by the compiler: "x.o: x.cpp a.h \<newline> b.h"

        def used() -> list[Path]:
            return [Path(f) for f in listed.read_text().replace("\\\n", " ").split()[1:]] if listed.exists() else []

        return _made(out, [*command, "-MMD", "-MF", str(listed)], used)

    def _link(self, program: Program, compiled: Sequence[Future[Path]]) -> Path:
        objects = [future.result() for future in compiled]
        out = BUILD / program.folder / program.main.stem
        return _made(out, [*COMPILER, *program.flags, *map(str, objects), "-o", str(out)], lambda: objects)


def _made(out: Path, command: Sequence[str], used: Callable[[], Iterable[Path]]) -> Path:
    """Runs the command where it, or a file that it used when it last made `out`, has changed since."""
    key = out.with_name(f"{out.name}.key")
    if out.exists() and key.exists() and key.read_text() == _digest(command, used()):
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    key.unlink(missing_ok=True)
    done = run(["nice", *command], capture_output=True, text=True, timeout=SECONDS, check=False, env=ENVIRON)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr[-8000:]}"
    key.write_text(_digest(command, used()))
    return out


def _digest(command: Sequence[str], files: Iterable[Path]) -> str:
    sha = hashlib.sha256("\0".join([_version(), *command]).encode())
    for file in files:
        sha.update(file.read_bytes() if file.exists() else b"missing")
    return sha.hexdigest()


@cache
def _version() -> str:
    """Of the compiler."""
    command = [*COMPILER, "--version"]
    return run(command, capture_output=True, text=True, timeout=60, check=True, env=ENVIRON).stdout
