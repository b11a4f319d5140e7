"""Which torch pycoll is built against: the one that the environment has, or else one that it asks for.

Runs before anything is installed (in the build backend, setup.py and the Makefile), so on the standard library alone.
"""

import importlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

FIRST = (2, 11)  # the oldest torch that builds and passes
END = (2, 16)  # the first that has not been tried
RANGE = f"torch>={FIRST[0]}.{FIRST[1]},<{END[0]}.{END[1]}"


def supported(version: str) -> bool:
    """Whether `version` (as of torch.__version__) lies in the range that pycoll is tested with."""
    match = re.match(r"(\d+)\.(\d+)", version)
    return match is not None and FIRST <= (int(match[1]), int(match[2])) < END


def requirement(version: str | None) -> str:
    """What the built package requires: exactly the torch it was built against, as its C++ ABI changes with releases.

    What follows a "+" (cpu, cu130) is left out: it names a build of the same release, not always one an index offers.
    """
    return RANGE if version is None else f"torch=={version.split('+')[0]}"


def installed_torch() -> str | None:
    """Version of this environment's torch, None where there is none that is supported.

    Sees through build isolation, and puts what that hides at the end of sys.path.
    """
    if version := _importable_torch():
        return version
    sys.path.extend(path for path in _target_path() if path not in sys.path)
    importlib.invalidate_caches()
    return _importable_torch()


def to_install(pin: str, explicit: bool) -> str | None:
    """What `make` has to install: nothing where a supported torch is, unless `explicit` asks for another version."""
    version = installed_torch()
    if version is None or (explicit and version.split("+")[0] != pin.split("+")[0]):
        return f"torch=={pin}"
    return None


def _importable_torch() -> str | None:
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return None
    return version if supported(version) else None


def _target_path() -> list[str]:
    """sys.path of the environment that is installed into, which pip's isolation hides through two variables alone."""
    environ = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
    command = [sys.executable, "-c", "import json, sys; print(json.dumps(sys.path[1:]))"]
    answer = subprocess.run(command, env=environ, capture_output=True, text=True, check=True, timeout=60)
    return [str(path) for path in json.loads(answer.stdout) if Path(path).is_dir()]


if __name__ == "__main__":  # python pycoll_torch.py VERSION default|explicit
    print(to_install(sys.argv[1], explicit=sys.argv[2] == "explicit") or "")
