"""What the extension was built against, checked before it is loaded.

An extension that meets another torch than it was compiled for fails to load, or worse, crashes. The build leaves a
record beside the extension (setup.py), so that `import pycoll` can say what is wrong and which command mends it.
"""

import importlib.metadata
import json
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

from pycoll.version import __version__


def build_info() -> dict[str, Any]:
    """The record of the build: torch (its version), cuda (built, archs, reason), cxx11_abi, compiler, flags.

    Raises ImportError where the extension is not built.
    """
    folder = Path(__file__).parent
    built = [path for suffix in EXTENSION_SUFFIXES if (path := folder / f"_C{suffix}").is_file()]
    if not built:
        python = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise ImportError(
            f"pycoll's extension is not built for Python {python}. Build it with:\n    {_build_command()}"
        )
    try:
        return dict(json.loads(built[0].with_suffix(".json").read_text(encoding="utf-8")))
    except (OSError, ValueError) as problem:
        raise ImportError(
            f"The record of what pycoll was built against cannot be read ({problem}). Build it anew with:\n"
            f"    {_build_command()}"
        ) from problem


def check() -> None:
    """ImportError that says what to do, where the extension or torch is missing, or torch is not the one built for."""
    wanted = build_info()["torch"]
    try:
        import torch
    except ImportError as problem:
        raise ImportError(
            f"pycoll was built against torch {wanted}, but torch cannot be imported ({problem}). Install it with:\n"
            f"    {sys.executable} -m pip install torch=={wanted.split('+')[0]}"
        ) from problem
    if torch.__version__ != wanted:
        raise ImportError(
            f"pycoll was built against torch {wanted}, but torch {torch.__version__} is here. Build it anew with:\n"
            f"    {_build_command()}"
        )


def summary() -> str:
    """One line: the versions, and whether CUDA was built or why not."""
    built = build_info()
    cuda = built["cuda"]
    text = (
        f"built for compute capability {', '.join(cuda['archs'])}" if cuda["built"] else f"left out: {cuda['reason']}"
    )
    return f"pycoll {__version__} on torch {built['torch']}; CUDA {text}"


def _build_command() -> str:
    """How to build pycoll again, from where it was installed from."""
    source, editable = str(Path(__file__).resolve().parent.parent), True
    try:
        record = importlib.metadata.distribution("pycoll").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        record = None
    if record is not None:
        origin = json.loads(record)
        source, editable = origin["url"].removeprefix("file://"), origin.get("dir_info", {}).get("editable", False)
    return f"{sys.executable} -m pip install {'-e' if editable else '--force-reinstall --no-deps'} {source}"
