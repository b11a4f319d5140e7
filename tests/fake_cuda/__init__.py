"""CUDA on host memory: libfake_cuda.so, preloaded, lets a torch built with CUDA believe that there are GPUs.

It proves host logic only (see fake.h). The library replaces every function of libcudart.so and is its own driver, under
the name libcuda.so.1.
"""

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

SOURCES = Path(__file__).parent
ROOT = SOURCES.parent.parent
LIBRARY = "libfake_cuda.so"
# What the driver also has, as far as anybody asks: cuMulticastGetGranularity and so on are "not supported".
DRIVER_STUBS = ("AddDevice", "BindAddr", "BindMem", "Create", "GetGranularity", "Unbind")
EXPORTS = "{ global: cuda*; __cuda*; cu[A-Z]*; fake_cuda_*; local: *; };\n"


def missing() -> str:
    """What keeps this environment from building it, for a test to skip; empty when nothing does."""
    if shutil.which("g++") is None or shutil.which("nm") is None:
        return "no g++ here"
    if not (_nvidia_folder() / "lib" / "libcudart.so.13").is_file():
        return "this torch does not come with CUDA 13"
    return "" if any((f / "cuda_runtime_api.h").is_file() for f in _header_folders()) else "no headers of CUDA here"


def build(target_folder: Path, devices: int = 1) -> dict[str, str]:
    """Compiles what has changed since the last time; returns the environment under which there are that many GPUs."""
    target_folder.mkdir(parents=True, exist_ok=True)
    library = target_folder / LIBRARY
    headers = [*SOURCES.glob("*.h"), *(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc").rglob("*.cuh")]
    newest_header = max(h.stat().st_mtime for h in headers)
    objects = []
    for source in sorted(SOURCES.glob("*.cpp")):
        compiled = target_folder / f"{source.stem}.o"
        objects.append(compiled)
        if not _is_newer(compiled, max(source.stat().st_mtime, newest_header)):
            _compile(source, compiled)
    if not _is_newer(library, max([o.stat().st_mtime for o in objects] + [Path(__file__).stat().st_mtime])):
        _link(objects, target_folder, library)
    preload = [str(library), *filter(None, [os.environ.get("LD_PRELOAD")])]
    return {"LD_PRELOAD": " ".join(dict.fromkeys(preload)), "FAKE_CUDA_DEVICES": str(devices)}


def _is_newer(file: Path, time: float) -> bool:
    return file.exists() and file.stat().st_mtime >= time


def _compile(source: Path, target: Path) -> None:
    include = [f"-I{f}" for f in (ROOT / "csrc", SOURCES, *_header_folders())]
    flags = ["-std=c++20", "-O1", "-g", "-fPIC", "-Wall", "-Wextra", "-Wno-deprecated-declarations"]
    subprocess.run(["g++", *flags, *include, "-c", str(source), "-o", str(target)], check=True)


def _link(objects: list[Path], folder: Path, library: Path) -> None:
    """With a stub for all that libcudart or torch's own libraries know and this one does not: none of them may reach
    the real runtime, which would look for a real driver."""
    wanted = _symbols("--defined-only", _nvidia_folder() / "lib" / "libcudart.so.13")
    wanted |= _symbols("--undefined-only", _package_folder("torch") / "lib" / "libcaffe2_nvrtc.so")
    wanted = {name for name in wanted if name.startswith(("cu", "__cuda")) and name.isidentifier()}
    wanted |= {f"cuMulticast{name}" for name in DRIVER_STUBS}
    have = set()
    for compiled in objects:
        have |= _symbols("--defined-only", compiled, dynamic=False)
    stubs = folder / "stubs.cc"
    lines = [f"STUB({name})\n" for name in sorted(wanted - have)]
    stubs.write_text(STUB_MACRO + "".join(lines))
    exports = folder / "exports.map"
    exports.write_text(EXPORTS)
    # torch opens libcuda.so.1 by name: that name is this library's.
    flags = [
        "-std=c++20",
        "-shared",
        "-fPIC",
        "-pthread",
        "-Wl,-soname,libcuda.so.1",
        f"-Wl,--version-script={exports}",
    ]
    new = library.with_suffix(".new")
    subprocess.run(["g++", *flags, str(stubs), *map(str, objects), "-ldl", "-o", str(new)], check=True)
    new.replace(library)  # processes that run with the old one keep it


STUB_MACRO = """// What is not implemented. 801 is both cudaErrorNotSupported and CUDA_ERROR_NOT_SUPPORTED.
#include <cstdio>
#include <cstdlib>
#define STUB(name)                                                                     \\
  extern "C" int name() {                                                              \\
    static const bool told = std::getenv("FAKE_CUDA_VERBOSE") != nullptr &&            \\
                             std::fprintf(stderr, "fake_cuda: no " #name " here\\n") > 0; \\
    (void)told;                                                                        \\
    return 801;                                                                        \\
  }
"""


def _symbols(which: str, file: Path, dynamic: bool = True) -> set[str]:
    command = ["nm", *(["-D"] if dynamic else []), which, str(file)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return {line.split()[-1].partition("@")[0] for line in lines}


def _package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.submodule_search_locations, f"{name} is not installed"
    return Path(next(iter(spec.submodule_search_locations)))


def _nvidia_folder() -> Path:
    """The CUDA runtime that came with torch."""
    return _package_folder("torch").parent / "nvidia" / "cu13"


def _header_folders() -> list[Path]:
    folders = (_nvidia_folder() / "include", Path("/usr/local/cuda/include"))
    return [f for f in folders if f.is_dir()]
