"""Whether the whole extension links against a CUDA torch and runs (`make cuda-link`). It needs no GPU.

An environment under build/ gets the CUDA torch, and a copy of the sources is built in it for one GPU: the extension of
the checkout, which is built in place for another torch, stays as it is. Environment and objects are kept, so that from
the second time on only what has changed is compiled. The tests marked `cuda` run there too, on the GPUs that
tests/fake_cuda pretends to be.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pycoll_cuda

ROOT = Path(__file__).resolve().parent.parent
FILES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "pycoll_autoload.py")
SOURCES = (*FILES, "build_support", "csrc", "pycoll", "benchmarks", "tests")
# Of what a checkout holds there, what a build leaves behind.
LEFT_OUT = shutil.ignore_patterns("_C.*.so", "_C.*.json", "*.egg-info", "__pycache__", "results")
ARCH = "9.0"


def build_requirements(root: Path = ROOT) -> list[str]:
    """Of pyproject.toml; NumPy, without which torch cannot be imported in full; and what tests/cuda needs."""
    text = (root / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.search(r"^\[build-system\]\nrequires = (\[.*\])$", text, re.MULTILINE)  # tomllib came with Python 3.11
    if listed is None:
        raise SystemExit("cuda-link: pyproject.toml does not begin with [build-system] and its requires in one line")
    return [*json.loads(listed[1]), "numpy", "pytest", "pytest-timeout"]


def copy_sources(target: Path, root: Path = ROOT) -> None:
    """Make `target` a copy of what the package is built from; its build/, where the objects are, stays."""
    target.mkdir(parents=True, exist_ok=True)
    for old in target.iterdir():
        if old.name == "build":
            continue
        if old.is_dir():
            shutil.rmtree(old)
        else:
            old.unlink()
    for name in SOURCES:  # with their times of change, by which ninja tells what to compile
        if (root / name).is_dir():
            shutil.copytree(root / name, target / name, ignore=LEFT_OUT)
        else:
            shutil.copy2(root / name, target / name)


def pip(python: Path) -> list[str | Path]:
    return [python, "-m", "pip", "--disable-pip-version-check", "install"]


def environment(folder: Path, torch: str) -> Path:
    """The Python of the environment `folder`, made if need be, with that torch and what the build needs in it.

    Raises CalledProcessError where they cannot be installed, for reasons that pip has printed.
    """
    python = folder / "bin" / "python"
    if not (folder / "bin" / "pip").is_file():  # what is made last
        print(f"cuda-link: torch {torch} with its CUDA libraries goes into {folder}, once: gigabytes", flush=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    subprocess.run([*pip(python), "--quiet", f"torch=={torch}", *build_requirements()], check=True)
    return python


def link(torch: str, root: Path = ROOT) -> int:
    """Install, build, and run tests/link_check.py; the exit status."""
    nvcc = pycoll_cuda.find_nvcc()
    if nvcc is None:
        print(f"cuda-link: left out, {pycoll_cuda.NO_NVCC}")
        return 0
    sources = root / "build" / "cuda-link"
    try:
        python = environment(root / "build" / "cuda-torch", torch)
        copy_sources(sources, root)
        environ = {
            **os.environ,
            "PATH": f"{python.parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",  # ninja is there
            "CUDA_HOME": str(nvcc.home),
            "PYCOLL_CUDA": "1",
            "TORCH_CUDA_ARCH_LIST": ARCH,
        }
        build = [*pip(python), "--no-build-isolation", "--no-deps", "--editable", sources]
        subprocess.run(build, env=environ, check=True)
        check = root / "tests" / "link_check.py"
        no_gpu = {**environ, "CUDA_VISIBLE_DEVICES": ""}
        subprocess.run([python, "-I", check, sources], env=no_gpu, check=True)  # -I: not the checkout's own pycoll
        tests = ["-m", "pytest", "-q", "-m", "cuda", "tests/cuda"]
        fake: list[str | Path] = [python, "tests/fake_cuda", root / "build" / "fake_cuda", "4", python, *tests]
        multiprocessors = {**environ, "FAKE_CUDA_MULTIPROCESSORS": "132"}
        subprocess.run(fake, env=multiprocessors, cwd=sources, check=True)
        # Streams that run by themselves show what waits for too little.
        by_themselves = {**multiprocessors, "FAKE_CUDA_ASYNC": "1"}
        subprocess.run([*fake, "-k", "device"], env=by_themselves, cwd=sources, check=True)
    except subprocess.CalledProcessError as problem:
        print(f"cuda-link: failed: {' '.join(map(str, problem.cmd))}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(link(sys.argv[1]))
