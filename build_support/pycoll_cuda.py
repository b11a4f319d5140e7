"""Whether CUDA can be built here, for which GPUs, and with which flags.

As a program (`make cuda-check`) it compiles every kernel for every GPU, and takes warnings and register spills for
errors. It needs nvcc, but neither a GPU nor torch.
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
    """Compile every kernel under root/csrc/cuda, and print a line for each; the exit status."""
    kernels = sorted((root / "csrc" / "cuda").glob("**/*.cu"))
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
        verdicts = list(pool.map(lambda kernel: _check_kernel(compiler, root, kernel), kernels))
    for _, text in verdicts:
        print(text)
    passed = sum(good for good, _ in verdicts)
    print(f"cuda-check: {passed} of {len(kernels)} kernel files pass (nvcc {nvcc.version}, {', '.join(ARCHS)})")
    return 0 if passed == len(kernels) else 1


def _check_kernel(nvcc: Path, root: Path, kernel: Path) -> tuple[bool, str]:
    """Whether one file passes, and what to print. A spilled register is an error, as each use is a trip to memory."""
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
    command += ["-Xptxas=-v", "-c", kernel, "-o", objects / f"{kernel.stem}.o"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    name = kernel.relative_to(root)
    if done.returncode != 0:
        return False, f"{name}: nvcc failed\n{done.stdout}"
    if re.search(r"[1-9]\d* bytes spill", done.stdout):
        return False, f"{name}: registers spill\n{done.stdout}"
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", done.stdout)]
    return True, f"{name}: {len(registers)} kernels, at most {max(registers, default=0)} registers, no spill"


def _output(*command: str | Path) -> str:
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60).stdout


if __name__ == "__main__":
    sys.exit(check_kernels())
