"""The rules of the house that a compiler does not see: who may include whom, and what no source may hold.

Each rule is a function from a folder to its violations. The repository must have none, and a bad sample must have one.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# torch -> cpu | cuda -> algorithms -> core, never the other way.
MAY_INCLUDE = {
    "core": {"core"},
    "algorithms": {"algorithms", "core"},
    "cpu": {"cpu", "algorithms", "core"},
    "cuda": {"cuda", "algorithms", "core"},
    "torch": {"torch", "cpu", "cuda", "algorithms", "core"},
}
CPP = {".h", ".hpp", ".cuh", ".cpp", ".cc", ".cu", ".inl"}
CODE = CPP | {".py", ".toml", ".mk", ".sh", ".yml"}
LONGEST = 300  # lines of a file that a reader can still find the way in

# The C++ standard library, and the part of CUDA's that is header-only and mirrors it.
STANDARD = re.compile(r"[a-z_0-9]+|cuda/(atomic|barrier|std/.+)")
TORCH = re.compile(r"(torch|ATen|c10|caffe2|pybind11)/.*|Python\.h")
INCLUDE = re.compile(r'^\s*#\s*include\s*(?:<([^>]+)>|"([^"]+)")', re.MULTILINE)
# Comments and literals; a literal is matched so that what looks like a comment in it is not one.
NOT_CODE = re.compile(r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])*'", re.DOTALL)
# Inline assembly that must not be moved is written `asm volatile`, which is no claim about memory order.
VOLATILE = re.compile(r"(?<!asm )(?<!asm__ )\bvolatile\b")
# A call, not a member of that name: qualified by std:: or nothing, at the start of a statement or an expression.
ENDS_PROCESS = re.compile(
    r"(?:\bstd::|(?<!\w)::|(?:^|[;{}(),!=]|\belse\b|\breturn\b)\s*)(?:_?exit|_Exit|quick_exit|abort|terminate)\s*\(",
    re.MULTILINE,
)


def sources(folder: Path, suffixes: set[str]) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.suffix in suffixes and path.is_file())


def code_of(path: Path) -> str:
    """The text without comments and literals, line numbers kept."""
    return NOT_CODE.sub(lambda match: '""' + "\n" * match[0].count("\n"), path.read_text(encoding="utf-8"))


def found(pattern: re.Pattern[str], root: Path, path: Path, text: str) -> list[str]:
    where = path.relative_to(root)
    return [
        f"{where}:{text.count(chr(10), 0, match.end()) + 1}: {match[0].strip()}" for match in pattern.finditer(text)
    ]


def wrong_includes(root: Path) -> list[str]:
    """The include rule; and csrc/core and csrc/algorithms know neither the operating system nor the CUDA runtime."""
    wrong = []
    for path in sources(root / "csrc", CPP):
        name, layer = path.relative_to(root), path.relative_to(root / "csrc").parts[0]
        if layer not in MAY_INCLUDE:
            wrong.append(f"{name}: belongs to no layer")
            continue
        for system, own in INCLUDE.findall(path.read_text(encoding="utf-8")):
            if own and own.split("/")[0] not in MAY_INCLUDE[layer]:
                wrong.append(f"{name}: {layer} may not include {own}")
            elif system and layer != "torch" and TORCH.fullmatch(system):
                wrong.append(f"{name}: torch's headers belong in csrc/torch: {system}")
            elif system and layer in ("core", "algorithms") and not STANDARD.fullmatch(system):
                wrong.append(f"{name}: {layer} knows the C++ standard library alone: {system}")
    return wrong


def volatiles(root: Path) -> list[str]:
    """`volatile` orders nothing between threads: core/atomic.h does."""
    return [hit for path in sources(root / "csrc", CPP) for hit in found(VOLATILE, root, path, code_of(path))]


def process_ends(root: Path) -> list[str]:
    """A library does not end the process of its user."""
    return [hit for path in sources(root / "csrc", CPP) for hit in found(ENDS_PROCESS, root, path, code_of(path))]


def native_builds(root: Path) -> list[str]:
    """What is built runs on other machines too: SIMD is chosen at run time."""
    folders = ("csrc", "pycoll", "benchmarks", "build_support", "tests", ".ci")
    paths = [path for folder in folders for path in sources(root / folder, CODE)]
    paths += [root / name for name in ("Makefile", "setup.py", "pyproject.toml", ".ci/run") if (root / name).is_file()]
    native = re.compile(r"-m(?:arch|cpu|tune)" + r"=native")
    return [hit for path in paths for hit in found(native, root, path, path.read_text(encoding="utf-8"))]


def long_files(root: Path) -> list[str]:
    """Files that a reader would lose the way in."""
    return [
        f"{path.relative_to(root)}: {length} lines"
        for folder in ("csrc", "pycoll", "benchmarks", "build_support")
        for path in sources(root / folder, CPP | {".py"})
        if (length := len(path.read_text(encoding="utf-8").splitlines())) > LONGEST
    ]


RULES = [wrong_includes, volatiles, process_ends, native_builds, long_files]


@pytest.mark.parametrize("rule", RULES)
def test_the_repository_keeps_the_rule(rule: Callable[[Path], list[str]]) -> None:
    assert list(sources(ROOT / "csrc", CPP)), "no sources found: the rule would hold for nothing"
    assert rule(ROOT) == []


@pytest.mark.parametrize(
    ("rule", "name", "text"),
    [
        (wrong_includes, "csrc/core/a.h", '#include "algorithms/ring.h"'),
        (wrong_includes, "csrc/core/a.h", "#include <pthread.h>"),
        (wrong_includes, "csrc/core/a.h", "  # include <sys/mman.h>"),
        (wrong_includes, "csrc/core/a.h", "#include <cuda_runtime.h>"),
        (wrong_includes, "csrc/core/a.h", "#include <torch/extension.h>"),
        (wrong_includes, "csrc/algorithms/a.h", '#include "cpu/wait.h"'),
        (wrong_includes, "csrc/algorithms/a.h", "#include <unistd.h>"),
        (wrong_includes, "csrc/cpu/a.cpp", '#include "cuda/launch.h"'),
        (wrong_includes, "csrc/cpu/a.cpp", '#include "../torch/work.h"'),
        (wrong_includes, "csrc/cpu/a.cpp", "#include <c10/util/Half.h>"),
        (wrong_includes, "csrc/cuda/a.cu", '#include "cpu/wait.h"'),
        (wrong_includes, "csrc/cuda/a.cuh", "#include <ATen/ATen.h>"),
        (wrong_includes, "csrc/other/a.h", ""),
        (volatiles, "csrc/cpu/a.h", "volatile int flag;"),
        (volatiles, "csrc/cuda/a.cu", "int x = *(const volatile int*)p;"),
        (process_ends, "csrc/cpu/a.cpp", "void f() { std::abort(); }"),
        (process_ends, "csrc/cpu/a.cpp", "void f() {\n  exit(1);\n}"),
        (process_ends, "csrc/cpu/a.cpp", "void f() { if (bad) return ::_exit(1); }"),
        (process_ends, "csrc/cpu/a.cpp", "void f() { if (bad) abort(); }"),
        (native_builds, "setup.py", 'FLAGS = ["-march' + '=native"]'),
        (native_builds, "tests/conftest.py", "# -mtune" + "=native"),
        (long_files, "csrc/cpu/a.cpp", "\n" * (LONGEST + 1)),
        (long_files, "pycoll/train/a.py", "\n" * (LONGEST + 1)),
        (long_files, "benchmarks/a.py", "\n" * (LONGEST + 1)),
        (long_files, "build_support/a.py", "\n" * (LONGEST + 1)),
    ],
)
def test_the_rule_finds_a_violation(rule: Callable[[Path], list[str]], name: str, text: str, tmp_path: Path) -> None:
    write(tmp_path / name, text)
    assert len(rule(tmp_path)) == 1


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("csrc/core/a.h", "#include <atomic>\n#include <cuda/std/chrono>\n"),
        ("csrc/core/a.h", '#include "core/b.h"\n'),
        ("csrc/algorithms/a.h", '#include "core/b.h"\n'),
        ("csrc/cpu/a.cpp", '#include <sys/mman.h>\n#include "algorithms/ring.h"\n'),
        ("csrc/cuda/a.cu", '#include <cuda_runtime.h>\n#include "algorithms/ring.h"\n'),
        ("csrc/torch/a.cpp", '#include <torch/extension.h>\n#include "cpu/wait.h"\n#include "cuda/launch.h"\n'),
        ("csrc/torch/work.cpp", "void abort() override { comm_->abort(why); }\nvoid Work::abort() {}\n"),
        ("csrc/cpu/a.cpp", '// volatile, abort()\nconst char* text = "volatile // exit(1)"; /* exit(1); */\n'),
        ("csrc/cuda/a.cuh", 'asm volatile("trap;");\n'),
        ("csrc/cpu/a.cpp", "\n" * LONGEST),
        ("pycoll/a.py", "\n" * LONGEST),
    ],
)
def test_the_rules_let_good_code_pass(name: str, text: str, tmp_path: Path) -> None:
    write(tmp_path / name, text)
    assert [hit for rule in RULES for hit in rule(tmp_path)] == []


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
