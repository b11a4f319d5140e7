"""`make gpu`: build for the GPU that is there, test on it, check memory accesses, and time it, within ten minutes.

It takes nothing from a network: the Python that runs this has torch and all else that is needed, or is told what it
lacks before anything is built. Results go to the folder that the command line names.
"""

import contextlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import signal
import site
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pycoll_cuda

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 570  # for everything
# Module -> what pip calls it, and the oldest version that will do.
NEEDS = {
    "torch": ("torch", "2.11"),
    "numpy": ("numpy", "1"),
    "pip": ("pip", "21.3"),
    "setuptools": ("setuptools", "77"),
    "pytest": ("pytest", "8"),
    "pytest_timeout": ("pytest-timeout", "2.3"),
    "rich": ("rich", "0"),
    "matplotlib": ("matplotlib", "0"),
}


@dataclass(frozen=True)
class Step:
    """One program, and the seconds that it must be left with; it may use what those before it have not."""

    name: str
    command: Sequence[str | Path]
    seconds: int
    needed: bool = False  # by the steps that follow


def lacking(environ: Mapping[str, str] = os.environ) -> list[str]:
    """What this Python and this machine do not have, as pip or a user calls it."""
    found = []
    for module, (name, oldest) in NEEDS.items():
        if importlib.util.find_spec(module) is None:
            found.append(name)
        elif _numbers(_version(name)) < _numbers(oldest):
            found.append(f"{name}>={oldest} (it has {_version(name)})")
    if shutil.which("ninja", path=environ.get("PATH")) is None:
        found.append("ninja")
    if pycoll_cuda.find_nvcc(environ) is None:
        found.append("nvcc (CUDA_HOME, PATH, /usr/local/cuda)")
    return found


def _version(name: str) -> str:
    """Of a package; one without a record, such as a folder on PYTHONPATH, is taken for new enough."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "9999"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def architecture() -> str:
    """The GPU's compute capability, such as 9.0. SystemExit where there is no GPU."""
    import torch

    if not torch.cuda.is_available():
        raise SystemExit(f"make gpu: torch {torch.__version__} sees no CUDA GPU")
    return "{}.{}".format(*torch.cuda.get_device_capability())


def environment(folder: Path) -> Path:
    """The Python of an environment that has what this one has, which may itself be one, and takes pycoll besides."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", "--system-site-packages", folder], check=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = folder / "lib" / version / "site-packages"
    # With what is installed there for development: torch loads the entry points of all packages that it sees.
    lines = [f"import site; site.addsitedir({folder!r})" for folder in site.getsitepackages()]
    (packages / "machine.pth").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "bin" / "python"


def steps(python: Path, out: Path) -> list[Step]:
    """What to do, in order."""
    install: list[str | Path] = ["install", "--no-index", "--no-build-isolation", "--no-deps", "--editable", ROOT]
    tests: list[str | Path] = [python, "-m", "pytest", "-m", "cuda", ROOT / "tests" / "cuda"]
    found = [
        Step("build", [python, "-m", "pip", *install], 240, needed=True),
        Step("tests", [*tests, f"--junitxml={out / 'tests.xml'}"], 100),
    ]
    for tool in ("memcheck", "synccheck"):
        sanitizer: list[str | Path] = [
            "compute-sanitizer",
            "--tool",
            tool,
            "--error-exitcode",
            "1",
            "--log-file",
            out / f"{tool}.txt",
        ]
        found.append(Step(tool, [*sanitizer, *tests, "-q", "-k", "every_dtype and 3"], 30))
    # The benchmarks end by themselves before they are ended, so that they write what they have. Called without their
    # command line, whose library a machine may lack.
    for name, settings, seconds in (
        ("local_group", "LocalGroupBench(seconds=40, forced_factor=16", 70),
        ("gpu", "GpuBench(seconds=60", 100),
    ):
        program = (
            f"import sys; from pathlib import Path; from pycoll.benchmarks.{name} import *; "
            f"sys.exit(main({settings}, output=Path(sys.argv[1]))))"
        )
        found.append(Step(name, [python, "-c", program, out], seconds))
    return found


def run(chosen: Sequence[Step], environ: Mapping[str, str], seconds: float = SECONDS) -> list[str]:
    """Run the steps, each bounded so that those after it have their time too. What went wrong, a line a step."""
    deadline = time.monotonic() + seconds
    wrong = []
    for place, step in enumerate(chosen):
        limit = deadline - time.monotonic() - sum(later.seconds for later in chosen[place + 1 :])
        print(f"make gpu: {step.name}, at most {limit:.0f} s", flush=True)
        began = time.monotonic()
        problem = _run_one(step, environ, limit)
        print(f"make gpu: {step.name} {problem or 'passed'} after {time.monotonic() - began:.0f} s", flush=True)
        if problem is not None:
            wrong.append(f"{step.name} {problem}")
            if step.needed:
                break
    return wrong


def _run_one(step: Step, environ: Mapping[str, str], limit: float) -> str | None:
    """None where it succeeded, else what happened."""
    try:
        process = subprocess.Popen(step.command, env=environ, start_new_session=True)
    except OSError as error:
        return f"could not be started ({error})"
    try:
        status = process.wait(max(1.0, limit))
    except subprocess.TimeoutExpired:
        return f"was ended, as it was not done in {limit:.0f} s"
    finally:  # also of Ctrl-C: the processes that it started, too
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return None if status == 0 else f"failed with status {status}"


def main(out: Path) -> int:
    """Everything; the exit status."""
    missing = lacking()
    if missing:
        print(
            f"make gpu: {sys.executable} lacks {', '.join(missing)}. Nothing is taken from a network: install what is "
            "missing, or name a folder that holds it in PYTHONPATH",
            file=sys.stderr,
        )
        return 1
    environ = {**os.environ, "PYCOLL_CUDA": "1", "TORCH_CUDA_ARCH_LIST": architecture()}
    nvcc = pycoll_cuda.find_nvcc()
    if nvcc is not None:  # compute-sanitizer lies beside it
        environ["PATH"] = os.pathsep.join([environ.get("PATH", os.defpath), str(nvcc.home / "bin")])
    out.mkdir(parents=True, exist_ok=True)
    wrong = run(steps(environment(ROOT / "build" / "gpu"), out.resolve()), environ)
    print(f"make gpu: {'; '.join(wrong) or 'all passed'}; results in {out}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
