"""Programs that never heard of pycoll: torch finds the backend, and is none the worse where pycoll is broken."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import pycoll
import pycoll_autoload

pytestmark = pytest.mark.timeout(120)

# What a user has: a backend is chosen on the command line, and pycoll is named nowhere.
PROGRAM = """
import argparse, sys
import torch
import torch.distributed as dist

parser = argparse.ArgumentParser()
parser.add_argument("--backend")
arguments = parser.parse_args()
assert not any(name.split(".")[0] == "pycoll" for name in sys.modules), "import torch is to load none of it"
dist.init_process_group(backend=arguments.backend)
torch.manual_seed(dist.get_rank())
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 1))
model(torch.full((2, 3), float(dist.get_rank()))).sum().backward()
gradient = next(model.parameters()).grad[0].tolist()
name = dist.group.WORLD._get_backend(torch.device("cpu")).name()
sys.stdout.write(f"rank {dist.get_rank()} over {name}: {gradient}\\n")  # in one piece, as ranks share it
dist.destroy_process_group()
"""


def test_torchrun_of_an_unmodified_program(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(PROGRAM)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*torchrun, str(script), "--backend=pycoll"], cwd=tmp_path, capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [f"rank {rank} over pycoll: [1.0, 1.0, 1.0]" for rank in range(2)]


def python(code: str, folder: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs `code` in `folder`, with `path` in front of where modules are looked for."""
    environ = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if path is not None:
        environ["PYTHONPATH"] = str(path)
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environ, capture_output=True, text=True, timeout=110
    )


IMPORT_TORCH = """if True:
    import json, sys, time
    started = time.perf_counter()
    import torch
    of_torch = time.perf_counter() - started
    modules = [name for name in sys.modules if name.split(".")[0] == "pycoll"]
    mapped = [line for line in open("/proc/self/maps") if "pycoll" in line]
    import importlib.metadata, torch.distributed as dist
    (entry,) = importlib.metadata.entry_points(group="torch.backends", name="pycoll")
    (other,) = importlib.metadata.entry_points(group="torch.distributed.backends", name="pycoll")
    register = entry.load()
    del dist.Backend.PYCOLL
    started = time.perf_counter()
    register()
    of_register = time.perf_counter() - started
    other.load()()
    print(json.dumps({"modules": modules, "mapped": mapped, "there": hasattr(dist.Backend, "PYCOLL"),
                      "of_torch": of_torch, "of_register": of_register}))
"""


def test_import_torch_loads_no_extension(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    done = python(IMPORT_TORCH, tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    with capfd.disabled():
        print(f"\nimport torch takes {found['of_torch']:.2f} s, of which pycoll {1e3 * found['of_register']:.2f} ms")
    assert (found["modules"], found["mapped"], found["there"]) == ([], [], True)


def test_registering_twice_changes_nothing() -> None:
    import torch.distributed as dist

    plugin = dist.Backend._plugins["PYCOLL"]
    pycoll_autoload.register()
    assert dist.Backend._plugins["PYCOLL"] is plugin


# pycoll is there, but something is wrong with it.


def extension_of(package: Path) -> Path:
    (extension,) = package.glob("_C*.so")
    return extension


def missing(package: Path) -> None:
    extension_of(package).unlink()


def unreadable(package: Path) -> None:
    extension_of(package).write_bytes(b"no shared library")


def of_another_torch(package: Path) -> None:
    extension_of(package).with_suffix(".json").write_text(json.dumps({"torch": "1.0.0"}))


TORCH_WORKS = """if True:
    import torch, torch.distributed as dist
    assert torch.ones(3).sum().item() == 3
    options = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    try:
        dist.init_process_group("pycoll", **options)
    except ImportError as e:
        print(e)
    else:
        raise AssertionError("there is nothing that could have been loaded")
    dist.init_process_group("gloo", **{**options, "store": dist.HashStore()})
    x = torch.ones(3)
    dist.all_reduce(x)
    dist.destroy_process_group()
    assert x.tolist() == [1.0] * 3
"""


@pytest.mark.parametrize(
    ("break_it", "said"),
    (
        (missing, "extension is not built"),
        (unreadable, "_C"),
        (of_another_torch, "built against torch 1.0.0"),
    ),
)
def test_torch_works_where_pycoll_is_broken(break_it: Callable[[Path], None], said: str, tmp_path: Path) -> None:
    """And who asks for pycoll is told what is wrong with it."""
    assert pycoll.__file__ is not None and pycoll_autoload.__file__ is not None
    package = tmp_path / "path" / "pycoll"
    shutil.copytree(Path(pycoll.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__", "train"))
    shutil.copy(pycoll_autoload.__file__, package.parent)
    break_it(package)
    done = python(TORCH_WORKS, tmp_path, package.parent)
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
