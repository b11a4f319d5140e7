"""The build backend (PEP 517, PEP 660): setuptools, building against the torch that the environment ends up with.

- torch is installed: it is used, through build isolation too, and nothing is downloaded.
- It is not: with build isolation the frontend fetches it for the build; without, `provide_torch` does.
- The built package requires exactly that version (setup.py): the frontend installs the same one, or says why it cannot.
"""

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

try:
    import setuptools
    from setuptools import build_meta
except ImportError as problem:
    raise SystemExit('Without build isolation the build needs: pip install "setuptools>=77" ninja') from problem

import pycoll_torch

if int(setuptools.__version__.split(".")[0]) < 77:
    raise SystemExit(f'setuptools {setuptools.__version__} is too old for this build: pip install "setuptools>=77"')

ROOT = Path(__file__).resolve().parent.parent
FETCHED = ROOT / "build" / "torch"  # a torch to build against, where neither the environment nor the frontend has one

Settings = dict[str, Any] | None

build_sdist = build_meta.build_sdist  # needs no torch


def get_requires_for_build_sdist(config_settings: Settings = None) -> list[str]:
    return []


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    return [] if pycoll_torch.installed_torch() else [pycoll_torch.RANGE]


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    return get_requires_for_build_wheel(config_settings)


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: Settings = None) -> str:
    provide_torch()
    name: str = build_meta.prepare_metadata_for_build_wheel(metadata_directory, config_settings)
    return name


def prepare_metadata_for_build_editable(metadata_directory: str, config_settings: Settings = None) -> str:
    provide_torch()
    name: str = build_meta.prepare_metadata_for_build_editable(metadata_directory, config_settings)
    return name


def build_wheel(wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None) -> str:
    provide_torch()
    for stale in (ROOT / "build").glob("lib*"):  # else modules deleted since the last build would be packed
        shutil.rmtree(stale)
    name: str = build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)
    shutil.rmtree(FETCHED, ignore_errors=True)
    return name


def build_editable(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    provide_torch()
    name: str = build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
    shutil.rmtree(FETCHED, ignore_errors=True)
    return name


def provide_torch() -> None:
    """Put a supported torch on sys.path and this interpreter's programs (ninja) on PATH.

    SystemExit that says what to do, where there is no torch and none can be fetched.
    """
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    if pycoll_torch.installed_torch():
        return
    sys.path.insert(0, str(FETCHED))
    importlib.invalidate_caches()
    if pycoll_torch.installed_torch():  # fetched by the hook that prepared the metadata
        return
    print(f"Neither {pycoll_torch.RANGE} nor build isolation: fetching a torch to build against", flush=True)
    command = [sys.executable, "-m", "pip", "install", "--target", str(FETCHED), pycoll_torch.RANGE]
    if subprocess.run(command).returncode != 0:
        raise SystemExit(f'torch is needed for the build: pip install "{pycoll_torch.RANGE}"')
    importlib.invalidate_caches()
