"""Whether CUDA can be built here, for which GPUs, and with which flags.

As a program (`make cuda-check`) it compiles every kernel for every GPU, shows the registers and the stack that each
takes, and takes warnings and register spills for errors. It needs nvcc, but neither a GPU nor torch.
"""

import concurrent.futures
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pycoll_ptxas

ROOT = Path(__file__).resolve().parent.parent
ARCHS = ("8.0", "9.0", "10.0", "12.0")  # compute capabilities: A100; H100 and H200; B200; RTX 50 and RTX PRO
# No fused multiply-add that the source does not spell out: the bits are then those of the CPU. Functions that are
# constexpr, the standard library's too, may be called in kernels. Two architectures are compiled at a time.
NVCC_FLAGS = ["-std=c++20", "-O3", "-fmad=false", "-Xcompiler=-ffp-contract=off", "--expt-relaxed-constexpr"]
NVCC_FLAGS += ["--threads=2"]
NO_NVCC = "there is no nvcc (CUDA_HOME, PATH, /usr/local/cuda)"


class CudaUnavailableError(RuntimeError):
    """PYCOLL_CUDA asks for what cannot be built here."""


@dataclass(frozen=True)
class Nvcc:
    path: Path
    home: Path  # of the toolkit, with include/ and lib64/
    version: str
    archs: tuple[str, ...]  # those of ARCHS that this compiler knows


@dataclass(frozen=True)
class Plan:
    nvcc: Nvcc | None  # None: CUDA is left out
    archs: tuple[str, ...]
    reason: str  # why it is left out


def find_nvcc(environ: Mapping[str, str] = os.environ) -> Nvcc | None:
    """The CUDA compiler: of CUDA_HOME or CUDA_PATH, else on PATH, else in its usual place."""
    home = environ.get("CUDA_HOME") or environ.get("CUDA_PATH")
    if home:
        path = Path(home, "bin", "nvcc")
    else:
        path = Path(shutil.which("nvcc", path=environ.get("PATH")) or "/usr/local/cuda/bin/nvcc")
    if not path.is_file():
        return None
    # nvcc on PATH may be a link or a script, so it is asked where its toolkit lies.
    top = re.search(r"TOP=(.+)", _output(path, "--dryrun", "-x", "cu", os.devnull))
    release = re.search(r"release (\d+\.\d+)", _output(path, "--version"))
    if top is None or release is None:
        return None
    known = _output(path, "--list-gpu-code").split()
    archs = tuple(arch for arch in ARCHS if f"sm_{arch.replace('.', '')}" in known)
    return Nvcc(path, Path(top[1].strip()).resolve(), release[1], archs)


def make_plan(
    torch_version: str, torch_cuda: str | None, kernels: Sequence[str], environ: Mapping[str, str] = os.environ
) -> Plan:
    """What to build for a torch whose torch.version.cuda is `torch_cuda`.

    Raises CudaUnavailableError where PYCOLL_CUDA=1 and something is missing.
    """
    wish = environ.get("PYCOLL_CUDA", "")
    if wish not in ("", "0", "1"):
        raise CudaUnavailableError(f"PYCOLL_CUDA={wish}: it can be 0 (leave CUDA out), 1 (insist on it) or unset")
    if wish == "0":
        return Plan(None, (), "PYCOLL_CUDA=0")
    nvcc = find_nvcc(environ)
    missing = []
    if not kernels:
        missing.append("csrc/cuda holds no kernels")
    if torch_cuda is None:
        missing.append(f"torch {torch_version} is a build without CUDA")
    if nvcc is None:
        missing.append(NO_NVCC)
    elif torch_cuda is not None and torch_cuda.split(".")[0] != nvcc.version.split(".")[0]:
        missing.append(f"nvcc is {nvcc.version}, but torch {torch_version} was built with CUDA {torch_cuda}")
    if missing and wish == "1":
        raise CudaUnavailableError(f"PYCOLL_CUDA=1, but {'; '.join(missing)}")
    if missing or nvcc is None:
        return Plan(None, (), "; ".join(missing))
    chosen = re.split(r"[;\s]+", environ.get("TORCH_CUDA_ARCH_LIST", "").strip())
    return Plan(nvcc, tuple(arch for arch in chosen if arch) or nvcc.archs, "")


def check_kernels(root: Path = ROOT) -> int:
    """Compile every kernel under root/csrc/cuda, and print a line for each on each GPU; the exit status."""
    folder = root / "csrc" / "cuda"
    files = sorted(folder.glob("**/*.cu"))
    nvcc = find_nvcc()
    if nvcc is None:
        print(f"cuda-check: left out, {NO_NVCC}")
        return 0
    if nvcc.archs != ARCHS:
        print(
            f"cuda-check: nvcc {nvcc.version} knows only {', '.join(nvcc.archs)} of {', '.join(ARCHS)}: use CUDA 12.8+"
        )
        return 1
    compiler = nvcc.path
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = list(pool.map(lambda file: _compile(compiler, root, file), files))
    logs, failures = {}, []
    for file, done in zip(files, compiled, strict=True):
        name = str(file.relative_to(folder))
        logs[name] = pycoll_ptxas.parse(done.stdout)
        if done.returncode != 0:
            failures.append(f"{name}: nvcc failed\n{done.stdout}")
        elif re.search(r"[1-9]\d* bytes spill", done.stdout):
            failures.append("\n".join([f"{name}: registers spill", *_lines({name: logs[name].spilling}, nvcc)]))
        elif not logs[name].kernels:
            print(f"{name}: no kernels")
    print("\n".join([*_lines({name: log.kernels for name, log in logs.items()}, nvcc), *failures]))
    passed = len(files) - len(failures)
    print(f"cuda-check: {passed} of {len(files)} kernel files pass (nvcc {nvcc.version}, {', '.join(ARCHS)})")
    return 1 if failures else 0


def _compile(nvcc: Path, root: Path, file: Path) -> subprocess.CompletedProcess[str]:
    """nvcc's exit status and what it and ptxas say of one file, for all of ARCHS."""
    command: list[str | Path] = [
        nvcc,
        *NVCC_FLAGS,
        "-I",
        root / "csrc",
        "-Werror=all-warnings",
        "-Xcompiler=-Wall,-Wextra,-Werror",
    ]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in (arch.replace(".", "") for arch in ARCHS)]
    objects = root / "build" / "cuda-check"
    objects.mkdir(parents=True, exist_ok=True)
    command += ["-Xptxas=-v", "-c", file, "-o", objects / f"{file.stem}.o"]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _lines(usages: Mapping[str, Sequence[pycoll_ptxas.Usage]], nvcc: Nvcc) -> list[str]:
    """The table of `usages`, with names that a reader knows. A spill is an error, as each use is a trip to memory."""
    names = list(dict.fromkeys(usage.name for found in usages.values() for usage in found))
    return pycoll_ptxas.table(usages, pycoll_ptxas.demangle(names, (nvcc.home / "bin" / "cu++filt", "c++filt")))


def _output(*command: str | Path) -> str:
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60).stdout


if __name__ == "__main__":
    sys.exit(check_kernels())
