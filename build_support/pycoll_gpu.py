"""`make gpu`: build for the GPU that is there, test on it, check memory accesses, and time it, within ten minutes.

It takes nothing from a network: the Python that runs this has torch and all else that building needs, or is told what
it lacks before anything is built. What only some steps need is told, and these are left out. Results go to the folder
that the command line names.
"""

import contextlib
import importlib.metadata
import importlib.util
import os
import re
import secrets
import shlex
import shutil
import signal
import site
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pycoll_cuda

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 570  # for everything
LEAST_SECONDS = 20.0  # with less a step is not begun
GRACE = 5.0  # of a step's seconds, to write what it has when its time is over
MARK = "PYCOLL_GPU_STEP"  # a variable by which the processes of a step are known, whatever became of their parents
# Module -> what pip calls it, and the oldest version that will do: to build and to import pycoll; and of some steps.
NEEDS = {
    "torch": ("torch", "2.11"),
    "numpy": ("numpy", "1"),
    "pip": ("pip", "21.3"),
    "setuptools": ("setuptools", "77"),
}
TEST_NEEDS = {"pytest": ("pytest", "8")}
TIMEOUT_NEEDS = {"pytest_timeout": ("pytest-timeout", "2.3")}
BENCH_NEEDS = {"rich": ("rich", "0")}
PLOT_NEEDS = {"matplotlib": ("matplotlib", "0")}
SANITIZER = "compute-sanitizer"
CLEAN = "ERROR SUMMARY: 0 errors"  # the end of its log, where it was there from the first kernel to the last
# What it checks: one test of each kernel (windows, channels, words), as it makes them many times as slow.
CHECKED = ("two_shot", "ring", "one_shot_ll")


@dataclass(frozen=True)
class Step:
    """One program, and the seconds that it must be left with; it may use what those before it have not."""

    name: str
    command: Sequence[str | Path]
    seconds: int
    needed: bool = False  # by the steps that follow
    lacks: Sequence[str] = ()  # why it is left out
    log: Path | None = None  # in which it must have written CLEAN


def absent(needs: Mapping[str, tuple[str, str]]) -> list[str]:
    """What this Python does not have, as pip calls it."""
    found = []
    for module, (name, oldest) in needs.items():
        if importlib.util.find_spec(module) is None:
            found.append(name)
        elif _numbers(_version(name)) < _numbers(oldest):
            found.append(f"{name}>={oldest} (it has {_version(name)})")
    return found


def lacking(environ: Mapping[str, str] = os.environ) -> list[str]:
    """What this Python and this machine do not have, and nothing can be built without, as pip or a user calls it."""
    found = absent(NEEDS)
    compiler = shlex.split(environ.get("CXX", "c++"))[0]
    if shutil.which(compiler, path=environ.get("PATH")) is None:
        found.append(f"{compiler} (a C++ compiler; CXX names another)")
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        found.append("Python.h (Python's headers)")
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
    # With what is installed there for development, since torch loads the entry points of all packages that it sees; and
    # those of sys.path too: an environment may have been given the packages of another by a file like this one.
    others = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    folders = dict.fromkeys([*site.getsitepackages(), *others])
    lines = [f"import site; site.addsitedir({path!r})" for path in folders]
    (packages / "machine.pth").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "bin" / "python"


def steps(python: Path, out: Path, environ: Mapping[str, str]) -> list[Step]:
    """What to do, in order."""
    install: list[str | Path] = ["install", "--no-index", "--no-build-isolation", "--no-deps", "--editable", ROOT]
    folder = ROOT / "tests" / "cuda"
    tests: list[str | Path] = [python, "-m", "pytest", "-m", "cuda"]
    if absent(TIMEOUT_NEEDS):  # whose settings pytest then does not know
        tests += ["-o", "addopts=-ra"]
    no_tests = absent(TEST_NEEDS)
    found = [
        Step("build", [python, "-m", "pip", *install], 165, needed=True),
        Step("tests", [*tests, folder, f"--junitxml={out / 'tests.xml'}"], 110, lacks=no_tests),
    ]
    no_sanitizer = [] if shutil.which(SANITIZER, path=environ.get("PATH")) else [SANITIZER]
    chosen = [f"{folder / 'test_local_group.py'}::test_every_dtype_and_operation[3-{name}]" for name in CHECKED]
    for tool in ("memcheck", "synccheck"):
        log = out / f"{tool}.txt"
        # It waits for the first call of CUDA however long importing torch takes: by default it gives up, and all that
        # follows runs unchecked. Calls that fail are no errors: torch asks for functions that the driver may not have.
        sanitizer: list[str | Path] = [SANITIZER, "--tool", tool, "--launch-timeout", "0", "--report-api-errors", "no"]
        sanitizer += ["--error-exitcode", "1", "--log-file", log]
        found.append(Step(tool, [*sanitizer, *tests, "-q", *chosen], 45, lacks=[*no_tests, *no_sanitizer], log=log))
    # The benchmarks begin nothing more some time before they are ended, and write what they have after each case. They
    # are called without their command line, whose library a machine may lack.
    for name, settings, seconds in (
        ("local_group", "LocalGroupBench(seconds=30, forced_factor=16", 55),
        ("gpu", "GpuBench(seconds=40", 70),
        ("training_gpu", "GpuTrainingBench(seconds=60", 80),  # the last: compiling may take what others have left
    ):
        program = (
            f"import sys; from pathlib import Path; from pycoll.benchmarks.{name} import *; "
            f"sys.exit(main({settings}, output=Path(sys.argv[1]))))"
        )
        found.append(Step(name, [python, "-c", program, out], seconds, lacks=absent(BENCH_NEEDS)))
    return found


def run(chosen: Sequence[Step], environ: Mapping[str, str], seconds: float = SECONDS) -> list[str]:
    """Run the steps, each bounded so that those after it have their time too. What went wrong, a line a step.

    What the others need may take all the time there is: what it takes beyond its own is missing at the end.
    """
    deadline = time.monotonic() + seconds
    wrong = []
    for place, step in enumerate(chosen):
        if step.lacks:
            wrong.append(f"{step.name} left out for want of {', '.join(step.lacks)}")
            print(f"make gpu: {wrong[-1]}", flush=True)
            continue
        left = deadline - time.monotonic()
        limit = max(left - sum(later.seconds for later in chosen[place + 1 :]), min(step.seconds, left))
        if step.needed:
            limit = left
        if limit < min(step.seconds, LEAST_SECONDS):
            wrong.append(f"{step.name} left out, as the time was over")
            print(f"make gpu: {wrong[-1]}", flush=True)
            continue
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
    if step.log is not None:
        step.log.unlink(missing_ok=True)  # of an earlier run
    mark = f"{MARK}={secrets.token_hex(8)}"
    name, _, value = mark.partition("=")
    try:
        process = subprocess.Popen(
            step.command, env={**environ, name: value}, start_new_session=True, preexec_fn=_heed_interrupts
        )
    except OSError as error:
        return f"could not be started ({error})"
    try:
        status = process.wait(max(1.0, limit - GRACE))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)  # pytest writes its report then
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        return f"was ended, as it was not done in {limit:.0f} s"
    finally:  # also of Ctrl-C: the processes that it started, too
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        _end_marked(mark)
    if status != 0:
        return f"failed with status {status}"
    if step.log is not None and not (step.log.is_file() and CLEAN in step.log.read_text(errors="replace")):
        return f"checked nothing: {step.log} does not say {CLEAN!r}"
    return None


def _heed_interrupts() -> None:
    """What is started in the background by a shell ignores them, and so does all that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _end_marked(mark: str) -> None:
    """What a step has left behind in sessions of its own, such as a benchmark's ranks, would keep the GPU busy."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # gone, or somebody else's
            if mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                os.kill(int(folder.name), signal.SIGKILL)


def main(out: Path) -> int:
    """Everything; the exit status."""
    began = time.monotonic()
    environ = {**os.environ, "PYCOLL_CUDA": "1"}
    # Programs that came with this Python, such as ninja, whether or not its environment is the active one.
    environ["PATH"] = os.pathsep.join([environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])
    missing = lacking(environ)
    if missing:
        print(
            f"make gpu: {sys.executable} lacks {', '.join(missing)}. Nothing is taken from a network: install what is "
            "missing, or name a folder that holds it in PYTHONPATH",
            file=sys.stderr,
        )
        return 1
    for needs, effect in ((TIMEOUT_NEEDS, "a test that hangs ends them all"), (PLOT_NEEDS, "there is no plot")):
        if without := absent(needs):
            print(f"make gpu: for want of {', '.join(without)}, {effect}", flush=True)
    environ["TORCH_CUDA_ARCH_LIST"] = architecture()
    # The kernels are few files for one GPU: without this most cores would wait for the longest of them.
    environ["NVCC_APPEND_FLAGS"] = f"{environ.get('NVCC_APPEND_FLAGS', '')} --split-compile=0".strip()
    nvcc = pycoll_cuda.find_nvcc(environ)
    if nvcc is not None:  # compute-sanitizer lies beside it
        environ["PATH"] = os.pathsep.join([environ["PATH"], str(nvcc.home / "bin"), str(nvcc.home / SANITIZER)])
    out.mkdir(parents=True, exist_ok=True)
    python = environment(ROOT / "build" / "gpu")
    wrong = run(steps(python, out.resolve(), environ), environ, SECONDS - (time.monotonic() - began))
    print(f"make gpu: {'; '.join(wrong) or 'all passed'}; results in {out}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
