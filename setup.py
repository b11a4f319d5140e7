"""The extension pycoll._C, and the requirement on the torch it is built against; everything else is in pyproject.toml.

Run by the build backend (build_support/pycoll_build.py), never directly: `pip install -e .`
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pycoll_cuda
import pycoll_torch
from setuptools import Extension, find_packages, setup

ROOT = Path(__file__).resolve().parent
LIBRARIES = ["numpy", "tyro", "rich", "matplotlib", "tensorboard", "safetensors"]
# No fused multiply-add that the source does not spell out, and no -march: the same bits on every machine.
CXX_FLAGS = [
    "-std=c++20",
    "-O3",
    "-g0",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fvisibility=hidden",
    "-pthread",
    "-Wall",
    "-Wextra",
]


def sources(folder: str, suffix: str) -> list[str]:
    """Files of a folder of csrc, relative to the root as setuptools wants them."""
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / folder).glob(f"*{suffix}"))


def require_tools() -> None:
    """SystemExit that says what to install, where compiling would fail with less clear words."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    if not sys.platform.startswith("linux"):
        raise SystemExit("pycoll needs Linux: memfd, futexes and robust mutexes are what it is built on")
    if shutil.which(compiler) is None:
        raise SystemExit(f"{compiler} is not found: install a C++ compiler (apt install g++), or name one with CXX=")
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        raise SystemExit("Python.h is not found: install Python's headers (apt install python3-dev)")


def plan_cuda(torch_version: str, torch_cuda: str | None) -> pycoll_cuda.Plan:
    """What to build of CUDA, with the environment set for torch.utils.cpp_extension, which reads it when imported."""
    try:
        plan = pycoll_cuda.make_plan(torch_version, torch_cuda, sources("cuda", ".cu"))
    except pycoll_cuda.CudaUnavailableError as problem:
        raise SystemExit(str(problem)) from None
    if plan.nvcc is not None:
        os.environ["CUDA_HOME"] = str(plan.nvcc.home)
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(plan.archs)
    return plan


def build_steps() -> dict[str, Any]:
    """Arguments of setup() for the extension, compiled by torch's own build_ext, through ninja."""
    import torch  # here, as an sdist is made without it

    cuda = plan_cuda(torch.__version__, torch.version.cuda)
    from torch.utils import cpp_extension

    device = "cpu" if cuda.nvcc is None else "cuda"
    cxx_flags = CXX_FLAGS + (["-Werror"] if os.environ.get("PYCOLL_WERROR") == "1" else [])
    headers = cpp_extension.include_paths(device)
    if cuda.nvcc is not None:  # CUDA's libraries, which torch's headers include: a toolkit of nvcc alone lacks them
        headers += [str(path) for path in sorted(Path(torch.__file__).parent.parent.glob("nvidia/*/include"))]
    for folder in headers:  # as system headers they raise no warnings
        cxx_flags += ["-isystem", folder]
    cxx_flags.append(f'-DPYCOLL_TORCH="{torch.__version__}"')  # so that another torch recompiles everything
    nvcc_flags = [*pycoll_cuda.NVCC_FLAGS, "-Xcompiler=-fvisibility=hidden"]
    libraries = ["c10", "torch", "torch_cpu", "torch_python"]
    files = sources("cpu", ".cpp") + sources("torch", ".cpp")
    if cuda.nvcc is not None:
        cxx_flags.append("-DPYCOLL_WITH_CUDA")
        # torch's own flags forbid the operators of the 16-bit types in kernels.
        nvcc_flags += [f"-U{flag[2:]}" for flag in cpp_extension.COMMON_NVCC_FLAGS if flag.startswith("-D__CUDA_NO_")]
        libraries += ["cudart", "c10_cuda", "torch_cuda"]
        files += sources("cuda", ".cu") + sources("cuda", ".cpp") + sources("torch/cuda", ".cpp")
    extension = Extension(
        "pycoll._C",
        sources=files,
        include_dirs=[str(ROOT / "csrc")],
        library_dirs=cpp_extension.library_paths(device),
        libraries=libraries,
        extra_compile_args={"cxx": cxx_flags, "nvcc": nvcc_flags},
        extra_link_args=["-pthread"],
        language="c++",
    )
    built = {
        "torch": torch.__version__,
        "cuda": {"built": cuda.nvcc is not None, "archs": list(cuda.archs), "reason": cuda.reason},
        "cxx11_abi": torch.compiled_with_cxx11_abi(),
        "flags": cxx_flags,
    }

    class BuildExtension(cpp_extension.BuildExtension):
        """torch's build_ext; keeps the objects between builds, and leaves a record beside the extension."""

        def finalize_options(self) -> None:
            super().finalize_options()
            self.build_temp = str(ROOT / "build" / f"temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}")
            self.force = True  # what to compile is ninja's decision, which knows headers and flags

        def run(self) -> None:
            require_tools()
            done = f"for {', '.join(cuda.archs)}" if cuda.nvcc is not None else f"left out: {cuda.reason}"
            print(f"pycoll: torch {torch.__version__}, CUDA {done}", flush=True)
            super().run()
            compiler = [*shlex.split(cpp_extension.get_cxx_compiler()), "--version"]
            version = subprocess.run(compiler, capture_output=True, text=True, check=True).stdout.splitlines()[0]
            record = Path(self.get_ext_fullpath("pycoll._C")).with_suffix(".json")
            record.write_text(json.dumps({**built, "compiler": version}, indent=2) + "\n", encoding="utf-8")

    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExtension}}


torch_version = pycoll_torch.installed_torch()
benchmarks = [f"pycoll.{name}" for name in find_packages(include=["benchmarks", "benchmarks.*"])]
setup(
    packages=find_packages(include=["pycoll", "pycoll.*"]) + benchmarks,
    py_modules=["pycoll_autoload"],
    package_dir={"pycoll": "pycoll", "pycoll.benchmarks": "benchmarks"},
    install_requires=[pycoll_torch.requirement(torch_version), *LIBRARIES],
    **(build_steps() if torch_version else {}),
)
