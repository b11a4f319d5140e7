"""The package: built for the torch of the environment, checked when imported, with CUDA or a reason why not."""

import contextlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pycoll_build
import pycoll_cuda
import pycoll_cuda_link
import pycoll_gpu
import pycoll_ptxas
import pycoll_torch
import pytest
import torch

from pycoll import _build
from pycoll.version import __version__

ROOT = Path(__file__).resolve().parent.parent
PUBLIC = torch.__version__.split("+")[0]
CUDA_TORCH = ("2.13.0+cu130", "13.0")
KERNELS = ["csrc/cuda/all_reduce.cu"]


def python(code: str, folder: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, cwd=folder, env={**os.environ, **environ}, capture_output=True, text=True, timeout=100
    )


# The check at import


def make_package(folder: Path, record: str | None) -> Path:
    """A package whose extension, which the check must keep from being loaded, is an empty file; and its record."""
    package = folder / "pycoll"
    package.mkdir()
    for name in ("__init__.py", "_build.py", "version.py"):
        shutil.copy(ROOT / "pycoll" / name, package)
    extension = package / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    extension.touch()
    if record is not None:
        extension.with_suffix(".json").write_text(record, encoding="utf-8")
    return extension


def import_error(folder: Path) -> str:
    done = python("import pycoll", folder)
    assert done.returncode == 1
    assert "ImportError: " in done.stderr
    return done.stderr.rpartition("ImportError: ")[2]


def own_record(**changes: str) -> str:
    """The record of the build under test, altered."""
    return json.dumps({**_build.build_info(), **changes})


def test_another_torch_than_was_built_against_is_refused(tmp_path: Path) -> None:
    make_package(tmp_path, own_record(torch="2.11.0+cu128"))
    message = import_error(tmp_path)
    assert f"was built against torch 2.11.0+cu128, but torch {torch.__version__} is here" in message
    assert f"{sys.executable} -m pip install " in message


def test_missing_torch_is_named_with_the_version_to_install(tmp_path: Path) -> None:
    make_package(tmp_path, own_record(torch="2.12.1+cpu"))
    (tmp_path / "torch.py").write_text("raise ImportError('gone')", encoding="utf-8")
    message = import_error(tmp_path)
    assert "built against torch 2.12.1+cpu, but torch cannot be imported (gone)" in message
    assert f"{sys.executable} -m pip install torch==2.12.1\n" in message


def test_missing_extension_is_named(tmp_path: Path) -> None:
    make_package(tmp_path, own_record()).unlink()
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert f"extension is not built for Python {version}. Build it with:" in import_error(tmp_path)


@pytest.mark.parametrize("record", [None, "", "{"])
def test_extension_without_a_record_is_not_trusted(tmp_path: Path, record: str | None) -> None:
    make_package(tmp_path, record)
    assert "cannot be read" in import_error(tmp_path)


@pytest.mark.parametrize(
    ("origin", "arguments"),
    [
        ({"url": "file:///src/pycoll", "dir_info": {"editable": True}}, "-e /src/pycoll"),
        ({"url": "file:///src/pycoll", "dir_info": {}}, "--force-reinstall --no-deps /src/pycoll"),
        (None, f"-e {ROOT}"),
    ],
)
def test_the_command_names_where_pycoll_came_from(
    origin: dict[str, Any] | None, arguments: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = None if origin is None else json.dumps(origin)
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: SimpleNamespace(read_text=lambda file: record))
    assert _build._build_command() == f"{sys.executable} -m pip install {arguments}"


def test_the_record_describes_this_build() -> None:
    record = _build.build_info()
    assert record["torch"] == torch.__version__
    assert record["cxx11_abi"] == torch.compiled_with_cxx11_abi()
    assert "-ffp-contract=off" in record["flags"]
    assert record["cuda"]["built"] == (record["cuda"]["reason"] == "") == bool(record["cuda"]["archs"])
    assert _build.summary().startswith(f"pycoll {__version__} on torch {torch.__version__}; CUDA ")


# What is installed


def test_the_installed_package_is_whole(tmp_path: Path) -> None:
    """Seen from another folder: version, requirement on torch, command, benchmarks, type marker."""
    code = """if True:
        import importlib.metadata, importlib.resources, json, pycoll, pycoll.benchmarks
        installed = importlib.metadata.distribution("pycoll")
        print(json.dumps({
            "version": [pycoll.__version__, installed.version],
            "torch": [line for line in installed.requires if line.startswith("torch")],
            "scripts": [(entry.name, entry.value) for entry in installed.entry_points],
            "typed": importlib.resources.files("pycoll").joinpath("py.typed").is_file(),
        }))
    """
    done = python(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "version": [__version__, __version__],
        "torch": [f"torch=={PUBLIC}"],
        "scripts": [["pycoll", "pycoll.cli:main"], *[["pycoll", "pycoll_autoload:register"]] * 2],
        "typed": True,
    }


# Which torch


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("2.10.2", False),
        ("2.11.0+cpu", True),
        ("2.15.1", True),
        ("2.15.0a0+git1234", True),
        ("2.16.0", False),
        ("3.0", False),
        ("1.13.1", False),
        ("unknown", False),
    ],
)
def test_supported_range_of_torch(version: str, expected: bool) -> None:
    assert pycoll_torch.supported(version) == expected


def test_requirement_is_the_very_version_built_against() -> None:
    assert pycoll_torch.requirement("2.13.0+cu130") == "torch==2.13.0"
    assert pycoll_torch.requirement("2.15.0a0+git1234") == "torch==2.15.0a0"
    assert pycoll_torch.requirement(None) == pycoll_torch.RANGE == "torch>=2.11,<2.16"


@pytest.mark.parametrize(
    ("there", "pin", "explicit", "expected"),
    [
        (None, "2.13.0", False, "torch==2.13.0"),
        ("2.12.0+cpu", "2.13.0", False, None),
        ("2.12.0+cpu", "2.13.0", True, "torch==2.13.0"),
        ("2.13.0+cpu", "2.13.0", True, None),
    ],
)
def test_make_keeps_a_torch_unless_told(
    there: str | None, pin: str, explicit: bool, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pycoll_torch, "installed_torch", lambda: there)
    assert pycoll_torch.to_install(pin, explicit) == expected


def test_installed_torch_is_found_through_build_isolation(tmp_path: Path) -> None:
    """As pip isolates: a sitecustomize on PYTHONPATH takes the environment's packages off sys.path."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys; sys.path[:] = [path for path in sys.path if 'site-packages' not in path]", encoding="utf-8"
    )
    code = "import importlib.util, pycoll_torch as t; print(importlib.util.find_spec('torch'), t.installed_torch())"
    isolation = os.pathsep.join([str(tmp_path), str(ROOT / "build_support")])
    done = python(code, tmp_path, PYTHONPATH=isolation, PYTHONNOUSERSITE="1")
    assert done.stdout.split() == ["None", importlib.metadata.version("torch")], done.stderr


@pytest.mark.parametrize(("there", "expected"), [("2.13.0", []), (None, [pycoll_torch.RANGE])])
def test_the_build_asks_for_torch_only_where_there_is_none(
    there: str | None, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pycoll_torch, "installed_torch", lambda: there)
    assert pycoll_build.get_requires_for_build_wheel() == expected
    assert pycoll_build.get_requires_for_build_editable() == expected
    assert pycoll_build.get_requires_for_build_sdist() == []


@pytest.fixture
def no_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An environment without torch; the folder that one is fetched into for the build."""
    monkeypatch.setattr(pycoll_torch, "installed_torch", lambda: None)
    monkeypatch.setattr(pycoll_build, "FETCHED", tmp_path / "torch")
    monkeypatch.setattr(sys, "path", sys.path[:])
    return tmp_path / "torch"


def test_without_torch_and_isolation_one_is_fetched(no_torch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = []
    monkeypatch.setattr(subprocess, "run", lambda command: commands.append(command) or SimpleNamespace(returncode=0))
    pycoll_build.provide_torch()
    assert commands == [[sys.executable, "-m", "pip", "install", "--target", str(no_torch), pycoll_torch.RANGE]]
    assert sys.path[0] == str(no_torch)


@pytest.mark.usefixtures("no_torch")
def test_a_torch_that_cannot_be_fetched_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda command: SimpleNamespace(returncode=1))
    with pytest.raises(SystemExit, match=r'torch is needed for the build: pip install "torch>=2.11,<2.16"'):
        pycoll_build.provide_torch()


# CUDA or not


@pytest.fixture
def toolkit(tmp_path: Path) -> Path:
    """A CUDA toolkit whose nvcc, a script, answers as NVIDIA's does, and which prints what it compiles."""
    home = tmp_path / "toolkit"
    (home / "bin").mkdir(parents=True)
    (home / "archs").write_text("sm_75\nsm_80\nsm_90\nsm_100\nsm_103\nsm_120\n", encoding="utf-8")
    (home / "release").write_text("Cuda compilation tools, release 13.0, V13.0.88\n", encoding="utf-8")
    nvcc = home / "bin" / "nvcc"
    nvcc.write_text(
        f"""#!/bin/sh
        case "$1" in
            --dryrun) echo '#$ TOP={home}/bin/..' >&2;;
            --version) cat {home}/release;;
            --list-gpu-code) cat {home}/archs;;
            *) for word; do case "$word" in *.cu) cat "$word"; grep -q error: "$word" && exit 2;; esac; done; exit 0;;
        esac
        """,
        encoding="utf-8",
    )
    nvcc.chmod(0o755)
    return home


def test_cuda_is_built_where_nvcc_and_torch_allow(toolkit: Path) -> None:
    for environ in ({"CUDA_HOME": str(toolkit)}, {"CUDA_PATH": str(toolkit)}, {"PATH": f"{toolkit}/bin:/bin:/usr/bin"}):
        plan = pycoll_cuda.make_plan(*CUDA_TORCH, KERNELS, environ)
        assert plan.nvcc is not None
        assert plan.nvcc.home == toolkit
        assert plan.archs == ("8.0", "9.0", "10.0", "12.0")
        assert plan.reason == ""


def test_architectures_are_those_asked_for_or_those_nvcc_knows(toolkit: Path) -> None:
    environ = {"CUDA_HOME": str(toolkit), "PYCOLL_CUDA": "1"}
    chosen = pycoll_cuda.make_plan(*CUDA_TORCH, KERNELS, {**environ, "TORCH_CUDA_ARCH_LIST": "9.0a; 12.0+PTX"})
    assert chosen.archs == ("9.0a", "12.0+PTX")
    (toolkit / "archs").write_text("sm_80\nsm_90\n", encoding="utf-8")
    assert pycoll_cuda.make_plan(*CUDA_TORCH, KERNELS, environ).archs == ("8.0", "9.0")


@pytest.mark.parametrize(
    ("version", "cuda", "kernels", "nvcc", "reason"),
    [
        ("2.13.0+cpu", None, KERNELS, True, "torch 2.13.0+cpu is a build without CUDA"),
        (*CUDA_TORCH, KERNELS, False, "there is no nvcc"),
        (*CUDA_TORCH, [], True, "csrc/cuda holds no kernels"),
        ("2.11.0+cu128", "12.8", KERNELS, True, "nvcc is 13.0, but torch 2.11.0+cu128 was built with CUDA 12.8"),
    ],
)
def test_cuda_left_out_says_why_and_insisting_is_an_error(
    version: str, cuda: str | None, kernels: list[str], nvcc: bool, reason: str, toolkit: Path
) -> None:
    environ = {"CUDA_HOME": str(toolkit if nvcc else toolkit / "elsewhere")}
    plan = pycoll_cuda.make_plan(version, cuda, kernels, environ)
    assert plan.nvcc is None
    assert reason in plan.reason
    with pytest.raises(pycoll_cuda.CudaUnavailableError, match="PYCOLL_CUDA=1, but") as raised:
        pycoll_cuda.make_plan(version, cuda, kernels, {**environ, "PYCOLL_CUDA": "1"})
    assert reason in str(raised.value)


def test_cuda_can_be_left_out_by_wish(toolkit: Path) -> None:
    environ = {"CUDA_HOME": str(toolkit), "PYCOLL_CUDA": "0"}
    assert pycoll_cuda.make_plan(*CUDA_TORCH, KERNELS, environ) == pycoll_cuda.Plan(None, (), "PYCOLL_CUDA=0")


def test_unknown_wish_for_cuda_is_an_error() -> None:
    with pytest.raises(pycoll_cuda.CudaUnavailableError, match=r"PYCOLL_CUDA=yes: it can be 0 .* 1 .* or unset"):
        pycoll_cuda.make_plan(*CUDA_TORCH, KERNELS, {"PYCOLL_CUDA": "yes"})


def test_the_build_ends_where_cuda_is_insisted_on_in_vain(tmp_path: Path) -> None:
    code = f"import pycoll_build; pycoll_build.prepare_metadata_for_build_editable({str(tmp_path)!r})"
    build_support = str(ROOT / "build_support")
    done = python(code, ROOT, PYTHONPATH=build_support, PYCOLL_CUDA="1", CUDA_HOME=str(tmp_path / "nowhere"))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("PYCOLL_CUDA=1, but ")
    assert "there is no nvcc" in done.stderr


# make cuda-check

# As nvcc 13.0 prints it, for a kernel that calls a function which is not inlined, on two GPUs.
CALLER, CALLED = "_ZN6pycoll12_GLOBAL__N_111copy_kernelINS_7Float16EEEvNS_4CallE", "_ZN6pycoll4stepILi3EEEvRKi"
FRAME = "    {} bytes stack frame, {} bytes spill stores, {} bytes spill loads\n"


def ptxas_log(gpu: str, registers: int, spilled: int = 0, spilled_when_called: int = 0) -> str:
    return (
        "ptxas info    : 64 bytes gmem, 8 bytes cmem[4]\n"
        f"ptxas info    : Compiling entry function '{CALLER}' for '{gpu}'\n"
        f"ptxas info    : Function properties for {CALLER}\n"
        f"{FRAME.format(24, spilled, spilled)}"
        f"ptxas info    : Used {registers} registers, used 1 barriers, 616 bytes cumulative stack size, 8 bytes smem\n"
        "ptxas info    : Compile time = 321.576 ms\n"
        f"ptxas info    : Function properties for {CALLED}\n"
        f"{FRAME.format(592, spilled_when_called, 0)}"
    )


GOOD = ptxas_log("sm_80", 172) + ptxas_log("sm_90", 96)


@pytest.mark.parametrize(
    ("log", "status", "printed"),
    [
        (GOOD, 0, ["a.cu  copy_kernel<Float16>  sm_80  172 registers, 616 bytes stack, 0 spilled\n"]),
        (GOOD, 0, ["a.cu  copy_kernel<Float16>  sm_90   96 registers, 616 bytes stack, 0 spilled\n"]),
        ("", 0, ["a.cu: no kernels"]),
        (
            GOOD + ptxas_log("sm_100", 255, spilled=64),
            1,
            ["a.cu: registers spill\na.cu  copy_kernel<Float16>  sm_100  255 registers, 616 bytes stack, 128"],
        ),
        (
            ptxas_log("sm_100", 255, spilled_when_called=8),
            1,
            ["255 registers, 616 bytes stack, 0 spilled", "a.cu  step<3>  sm_100  ? registers, 592 bytes stack, 8"],
        ),
        (GOOD + "a.cu(3): error: expected a ;\n", 1, ["a.cu: nvcc failed", "expected a ;"]),
    ],
)
def test_cuda_check_shows_what_kernels_take_and_finds_spills_and_errors(
    log: str,
    status: int,
    printed: list[str],
    toolkit: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "csrc" / "cuda").mkdir(parents=True)
    (tmp_path / "csrc" / "cuda" / "a.cu").write_text(log, encoding="utf-8")
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    monkeypatch.setattr(pycoll_ptxas, "demangle", demangled)
    assert pycoll_cuda.check_kernels(tmp_path) == status
    shown = capsys.readouterr().out
    assert all(line in shown for line in printed)
    assert f"cuda-check: {1 - status} of 1 kernel files pass" in shown


def demangled(names: list[str], tools: object) -> dict[str, str]:
    """As binutils would, which a machine may lack."""
    known = {
        CALLER: "void pycoll::(anonymous namespace)::copy_kernel<pycoll::Float16>(pycoll::Call)",
        CALLED: "void pycoll::step<3>(int const&)",
    }
    return {name: pycoll_ptxas.short(known[name]) for name in names}


def test_a_spill_is_found_in_words_that_are_not_understood(
    toolkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "csrc" / "cuda").mkdir(parents=True)
    (tmp_path / "csrc" / "cuda" / "a.cu").write_text("a kernel: 12 bytes spill", encoding="utf-8")
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    assert pycoll_cuda.check_kernels(tmp_path) == 1


@pytest.mark.parametrize(
    ("function", "name"),
    [
        ("pycoll::cuda_device::(anonymous namespace)::prepare_kernel(pycoll::Rank const*, int)", "prepare_kernel"),
        ("void <unnamed>::kernel<float, (pycoll::Op)0>(pycoll::A (*)(int))", "kernel<float, (Op)0>"),
        ("plain_name", "plain_name"),
        (f"void kernel<{'x' * 100}>()", f"kernel<{'x' * (pycoll_ptxas.LONGEST_NAME - 9)}.."),
    ],
)
def test_names_of_kernels_are_short(function: str, name: str) -> None:
    assert pycoll_ptxas.short(function) == name


@pytest.mark.parametrize(
    ("script", "name"), [("sed s/_Z1fi/f\\(int\\)/", "f"), ("exit 1", "_Z1fi"), ("echo two; echo lines", "_Z1fi")]
)
def test_names_are_demangled_where_there_is_a_tool(script: str, name: str, tmp_path: Path) -> None:
    tool = tmp_path / "c++filt"
    tool.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    tool.chmod(0o755)
    assert pycoll_ptxas.demangle(["_Z1fi"], [tmp_path / "absent", tool]) == {"_Z1fi": name}


def test_cuda_check_asks_for_an_nvcc_that_knows_every_architecture(
    toolkit: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (toolkit / "archs").write_text("sm_80\nsm_90\n", encoding="utf-8")
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    assert pycoll_cuda.check_kernels() == 1
    assert "knows only 8.0, 9.0 of 8.0, 9.0, 10.0, 12.0" in capsys.readouterr().out


def test_cuda_check_without_nvcc_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert pycoll_cuda.check_kernels() == 0
    assert capsys.readouterr().out == "cuda-check: left out, there is no nvcc (CUDA_HOME, PATH, /usr/local/cuda)\n"


# make cuda-link


def test_cuda_link_installs_what_the_build_requires() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    tools = ["numpy", "pytest", "pytest-timeout"]
    assert pycoll_cuda_link.build_requirements() == [*project["build-system"]["requires"], *tools]


def test_cuda_link_copies_the_sources_and_keeps_the_objects(tmp_path: Path) -> None:
    root, target = tmp_path / "checkout", tmp_path / "copy"
    for name in (*pycoll_cuda_link.FILES, "csrc/cuda/a.cu", "pycoll/_C.pyi"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("new", encoding="utf-8")
    for name in ("build_support", "benchmarks", "tests"):
        (root / name).mkdir()
    (root / "pycoll" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").touch()
    for name in ("build/a.o", "csrc/cuda/gone.cu", "setup.py"):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text("old", encoding="utf-8")
    os.utime(root / "csrc" / "cuda" / "a.cu", (1, 1))
    pycoll_cuda_link.copy_sources(target, root)
    there = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    sources = {*pycoll_cuda_link.FILES, "csrc/cuda/a.cu", "pycoll/_C.pyi"}
    assert there == sources | {"build/a.o"}
    assert (target / "setup.py").read_text(encoding="utf-8") == "new"
    assert (target / "csrc" / "cuda" / "a.cu").stat().st_mtime == 1, "ninja would compile it again"


def test_cuda_link_takes_all_that_the_package_is_built_from() -> None:
    assert all((ROOT / name).exists() for name in pycoll_cuda_link.SOURCES)


def test_cuda_link_without_nvcc_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert pycoll_cuda_link.link("2.11.0", tmp_path) == 0
    assert capsys.readouterr().out == "cuda-link: left out, there is no nvcc (CUDA_HOME, PATH, /usr/local/cuda)\n"
    assert not list(tmp_path.iterdir())


def test_cuda_link_fails_where_pip_does(
    toolkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    commands = []

    def run(command: list[object], **options: object) -> None:
        commands.append(command)
        if "pip" in command:
            raise subprocess.CalledProcessError(1, command)

    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    monkeypatch.setattr(pycoll_cuda, "find_nvcc", lambda: SimpleNamespace(home=toolkit))
    monkeypatch.setattr(subprocess, "run", run)
    assert pycoll_cuda_link.link("2.11.0", tmp_path) == 1
    assert [command[1:3] for command in commands] == [["-m", "venv"], ["-m", "pip"]]
    assert "torch==2.11.0" in commands[1]
    assert "cuda-link: failed: " in capsys.readouterr().err


# make gpu


def test_make_gpu_names_what_is_missing_before_it_builds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        pycoll_gpu, "NEEDS", {"json": ("json", "0"), "absent_a": ("absent-a", "1"), "numpy": ("numpy", "999")}
    )
    monkeypatch.setattr(pycoll_gpu, "run", lambda *_: pytest.fail("it was built"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "g++ -m64")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert pycoll_gpu.main(tmp_path / "out") == 1
    said = capsys.readouterr().err
    compiler = "g++ (a C++ compiler; CXX names another)"
    assert f"lacks absent-a, numpy>=999 (it has {importlib.metadata.version('numpy')}), {compiler}, ninja, nvcc" in said
    assert not (tmp_path / "out").exists()


def test_make_gpu_needs_what_the_project_requires() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    required = project["build-system"]["requires"] + project["project"]["optional-dependencies"]["dev"]
    oldest = dict(line.split(">=") for line in required if ">=" in line)
    needs = dict([*pycoll_gpu.NEEDS.values(), *pycoll_gpu.TEST_NEEDS.values(), *pycoll_gpu.TIMEOUT_NEEDS.values()])
    assert {name: needs[name] for name in oldest.keys() & needs.keys()} == {
        name: oldest[name] for name in ("setuptools", "pytest", "pytest-timeout")
    }


def test_make_gpu_without_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"make gpu: torch .+ sees no CUDA GPU"):
        pycoll_gpu.architecture()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert pycoll_gpu.architecture() == "9.0"


def test_the_environment_of_make_gpu_has_what_this_one_has(tmp_path: Path) -> None:
    """This one is an environment itself, as a rule, whose packages a new one would not see by itself."""
    environment = pycoll_gpu.environment(tmp_path / "gpu")
    code = "import sys, torch, pip; print(torch.__file__, sys.prefix)"
    done = subprocess.run([environment, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=100)
    assert done.stdout.split() == [torch.__file__, str(tmp_path / "gpu")], done.stderr


def test_make_gpu_ends_in_time(tmp_path: Path) -> None:
    chosen = pycoll_gpu.steps(Path("python"), tmp_path, os.environ)
    assert sum(step.seconds for step in chosen) <= pycoll_gpu.SECONDS < 600
    assert all(step.seconds > pycoll_gpu.GRACE for step in chosen)


def test_make_gpu_begins_with_what_one_gpu_shows_and_checks_tests_that_there_are(tmp_path: Path) -> None:
    steps = {step.name: step for step in pycoll_gpu.steps(Path(sys.executable), tmp_path, os.environ)}
    collect = [*steps["tests"].command, "--collect-only", "-q"]
    done = subprocess.run(collect, capture_output=True, text=True, cwd=tmp_path, timeout=100)
    collected = [str(ROOT / line) for line in done.stdout.splitlines() if "::" in line]
    assert collected, done.stderr
    of_local_group = ["test_local_group.py::" in name for name in collected]
    assert any(of_local_group) and sorted(of_local_group, reverse=True) == of_local_group
    for tool in ("memcheck", "synccheck"):
        checked = [str(word) for word in steps[tool].command if "::" in str(word)]
        assert len(checked) == 3 and set(checked) <= set(collected)
        assert str(steps[tool].log) in map(str, steps[tool].command)


def test_make_gpu_leaves_out_what_this_machine_cannot_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = {"absent_a": ("absent-a", "1")}
    monkeypatch.setattr(pycoll_gpu, "BENCH_NEEDS", absent)
    monkeypatch.setattr(pycoll_gpu, "TIMEOUT_NEEDS", absent)
    chosen = pycoll_gpu.steps(Path("python"), tmp_path, {"PATH": str(tmp_path)})
    lacks = {step.name: list(step.lacks) for step in chosen}
    sanitizer, library = ["compute-sanitizer"], ["absent-a"]
    assert lacks == {
        "build": [], "tests": [], "memcheck": sanitizer, "synccheck": sanitizer, "local_group": library, "gpu": library,
        "training_gpu": library,
    }  # fmt: skip
    assert "addopts=-ra" in chosen[1].command, "pytest takes no offence at settings of a plugin that is not there"
    monkeypatch.setattr(pycoll_gpu, "TEST_NEEDS", absent)
    chosen = pycoll_gpu.steps(Path("python"), tmp_path, os.environ)
    assert chosen[1].lacks == library
    left_out = [pycoll_gpu.Step("first", ["absent"], 1, lacks=library), shell("second", f"touch {tmp_path}/second")]
    assert pycoll_gpu.run(left_out, {}, 60) == ["first left out for want of absent-a"]
    assert (tmp_path / "second").exists() and "make gpu: first left out" in capsys.readouterr().out


def shell(name: str, script: str, seconds: int = 1, needed: bool = False) -> pycoll_gpu.Step:
    return pycoll_gpu.Step(name, ["/bin/sh", "-c", script], seconds, needed)


def test_make_gpu_tells_what_went_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "there" / "results"
    said = 'echo "$PYCOLL_CUDA $TORCH_CUDA_ARCH_LIST $NVCC_APPEND_FLAGS" > "$0/said"'

    def steps(python: Path, folder: Path, environ: dict[str, str]) -> list[pycoll_gpu.Step]:
        assert Path(environ["PATH"].split(os.pathsep)[-1]).name == "compute-sanitizer"
        return [
            pycoll_gpu.Step("first", ["/bin/sh", "-c", said, folder], 1),
            shell("second", "exit 1"),
            pycoll_gpu.Step("third", ["absent"], 1, lacks=["rich"]),
        ]

    nvcc = pycoll_cuda.Nvcc(tmp_path / "bin" / "nvcc", tmp_path, "13.0", ("9.0",))
    monkeypatch.setattr(pycoll_cuda, "find_nvcc", lambda environ: nvcc)
    monkeypatch.setattr(pycoll_gpu, "lacking", lambda environ: [])
    monkeypatch.setattr(pycoll_gpu, "architecture", lambda: "9.0")
    monkeypatch.setattr(pycoll_gpu, "environment", lambda folder: tmp_path / "python")
    monkeypatch.setattr(pycoll_gpu, "PLOT_NEEDS", {"absent_a": ("absent-a", "1")})
    monkeypatch.setattr(pycoll_gpu, "steps", steps)
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "-lineinfo")
    assert pycoll_gpu.main(out) == 1
    assert (out / "said").read_text() == "1 9.0 -lineinfo --split-compile=0\n"
    told = capfd.readouterr().out
    assert "for want of absent-a, there is no plot" in told
    assert f"make gpu: second failed with status 1; third left out for want of rich; results in {out}" in told


def test_a_step_of_make_gpu_that_checked_nothing_has_failed(tmp_path: Path) -> None:
    """compute-sanitizer may let a program run that it did not get hold of."""

    def checks(name: str, script: str) -> pycoll_gpu.Step:
        return pycoll_gpu.Step(name, ["/bin/sh", "-c", script, tmp_path / name], 1, log=tmp_path / name)

    (tmp_path / "stale").write_text(pycoll_gpu.CLEAN)
    chosen = [
        checks("clean", 'echo "========= ERROR SUMMARY: 0 errors" > "$0"'),
        checks("late", 'echo "========= Error: No attachable process found." > "$0"'),
        checks("stale", "exit 0"),
        checks("dirty", 'echo "========= ERROR SUMMARY: 2 errors" > "$0"; exit 1'),
    ]
    says = "does not say 'ERROR SUMMARY: 0 errors'"
    assert pycoll_gpu.run(chosen, {}, 60) == [
        f"late checked nothing: {tmp_path / 'late'} {says}",
        f"stale checked nothing: {tmp_path / 'stale'} {says}",
        "dirty failed with status 1",
    ]


def test_steps_of_make_gpu_go_on_after_failures(tmp_path: Path) -> None:
    chosen = [
        shell("first", "exit 0"),
        shell("second", "exit 3"),
        pycoll_gpu.Step("third", [tmp_path / "absent"], 1),
        shell("fourth", f"touch {tmp_path}/fourth"),
    ]
    wrong = pycoll_gpu.run(chosen, {}, 60)
    assert [line.partition(" (")[0] for line in wrong] == ["second failed with status 3", "third could not be started"]
    assert (tmp_path / "fourth").exists()
    assert pycoll_gpu.run([shell("build", "exit 1", needed=True), shell("tests", "exit 1")], {}, 60) == [
        "build failed with status 1"
    ]


def test_a_slow_build_of_make_gpu_takes_the_time_of_what_comes_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pycoll_gpu, "GRACE", 0.0)
    chosen = [
        shell("build", "sleep 3", 2, needed=True),
        shell("tests", "sleep 1.5", 2),
        shell("bench", f"touch {tmp_path}/bench", 2),
    ]
    assert pycoll_gpu.run(chosen, {"PATH": os.defpath}, 5.9) == ["bench left out, as the time was over"]
    assert not (tmp_path / "bench").exists()


def test_a_step_of_make_gpu_that_takes_too_long_is_ended_with_all_it_started(tmp_path: Path) -> None:
    """Also what is in a session of its own, as a benchmark's ranks are; but it may first write what it has."""
    started = f"sleep 60 & echo $! > {tmp_path}/pid; setsid sleep 60 & echo $! > {tmp_path}/other"
    script = f"trap 'echo report > {tmp_path}/report; exit' INT; {started}; wait"
    chosen = [shell("slow", script, 6), shell("later", "exit 0", 30)]
    assert pycoll_gpu.run(chosen, {"PATH": os.defpath}, 36.0) == ["slow was ended, as it was not done in 6 s"]
    assert (tmp_path / "report").exists()
    for name in ("pid", "other"):
        assert ends(int((tmp_path / name).read_text())), name


def ends(pid: int) -> bool:
    """Whether the process has ended, or does within 5 s: being killed takes a moment."""
    state = Path(f"/proc/{pid}/stat")
    for _ in range(100):
        with contextlib.suppress(OSError):
            if state.read_text().rpartition(")")[2].split()[0] != "Z":
                time.sleep(0.05)
                continue
        return True
    return False
