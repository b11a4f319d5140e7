"""What ptxas says of kernels (`nvcc -Xptxas=-v`): registers, stack and spills of each on each GPU, as a table."""

import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

LONGEST_NAME = 64  # columns; template arguments can be longer than any line

_KERNEL = re.compile(r"Compiling entry function '([^']+)' for '(\w+)'")
_PROPERTIES = re.compile(r"Function properties for '?([^\s']+)")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_CALLS = re.compile(r"(\d+) bytes cumulative stack size")
_SCOPE = re.compile(r"\(anonymous namespace\)::|<unnamed>::|\b\w+::")


@dataclass
class Usage:
    """What one function takes on one GPU."""

    name: str  # as the linker sees it
    gpu: str = ""  # such as sm_90
    registers: int | None = None  # which ptxas tells of kernels, not of the functions that they call
    stack: int = 0  # bytes; of a kernel with those of the functions that it calls
    spilled: int = 0  # bytes stored and loaded because registers ran out


@dataclass
class Log:
    """The functions that a log tells of: kernels, and those that they call and that are not inlined."""

    kernels: list[Usage] = field(default_factory=list)
    functions: list[Usage] = field(default_factory=list)

    @property
    def spilling(self) -> list[Usage]:
        return [usage for usage in self.kernels + self.functions if usage.spilled]


def parse(text: str) -> Log:
    """What `text` says, among whatever else it holds."""
    log = Log()
    subject = Usage("a function")  # of the next line that tells a frame
    for line in text.splitlines():
        if match := _KERNEL.search(line):
            subject = Usage(match[1], match[2])
            log.kernels.append(subject)
        elif match := _PROPERTIES.search(line):
            kernel = log.kernels[-1] if log.kernels else None
            if kernel is not None and kernel.name == match[1]:
                subject = kernel
            else:
                subject = Usage(match[1], kernel.gpu if kernel else "")
                log.functions.append(subject)
        elif match := _FRAME.search(line):
            subject.stack = max(subject.stack, int(match[1]))
            subject.spilled += int(match[2]) + int(match[3])
        elif (match := _USED.search(line)) and log.kernels and log.kernels[-1].registers is None:
            log.kernels[-1].registers = int(match[1])
            if calls := _CALLS.search(line):
                log.kernels[-1].stack = max(log.kernels[-1].stack, int(calls[1]))
    return log


def demangle(names: Sequence[str], tools: Sequence[str | Path] = ("cu++filt", "c++filt")) -> dict[str, str]:
    """What a reader calls each of `names`; the same, where none of the `tools` is there or they fail."""
    for tool in tools:
        path = shutil.which(tool)
        if path is None or not names:
            continue
        done = subprocess.run([path], input="\n".join(names), capture_output=True, text=True, timeout=60)
        lines = done.stdout.splitlines()
        if done.returncode == 0 and len(lines) == len(names):
            return {name: short(line) for name, line in zip(names, lines, strict=True)}
    return {name: name for name in names}


def short(function: str) -> str:
    """`function` without its return type, namespaces and parameters: `void a::f<a::T>(int)` is `f<T>`."""
    name = _SCOPE.sub("", function.strip())
    if name.endswith(")"):  # the parameters: back to the parenthesis that opens them
        depth = 0
        for place in range(len(name) - 1, -1, -1):
            depth += {")": 1, "(": -1}.get(name[place], 0)
            if depth == 0:
                name = name[:place]
                break
    name = name.removeprefix("void ")
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 2] + ".."


def table(usages: Mapping[str, Sequence[Usage]], names: Mapping[str, str]) -> list[str]:
    """A line for each of `usages`, which are by file, in columns, a function's GPUs together.

    `names` is from demangle().
    """
    rows = []
    for file, found in usages.items():
        order = list(dict.fromkeys(usage.name for usage in found))  # ptxas tells of one GPU after another, in any order
        for usage in sorted(found, key=lambda usage: (order.index(usage.name), len(usage.gpu), usage.gpu)):
            registers = "? registers" if usage.registers is None else f"{usage.registers} registers"
            sizes = f"{usage.stack} bytes stack", f"{usage.spilled} spilled"
            rows.append((file, names.get(usage.name, usage.name), usage.gpu, registers, *sizes))
    if not rows:
        return []
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    # Words to the left, figures to the right, so that digits stand below one another.
    lines = []
    for row in rows:
        words = [cell.ljust(width) for cell, width in zip(row[:3], widths[:3], strict=True)]
        figures = [cell.rjust(width) for cell, width in zip(row[3:], widths[3:], strict=True)]
        lines.append(f"{'  '.join(words)}  {', '.join(figures)}")
    return lines
