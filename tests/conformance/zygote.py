"""The process that has imported torch and its suite, and forks: a process a test, and from that the test's ranks.

`python -m conformance.zygote ORDER`, ORDER being the JSON of an `Order`. It writes a line of JSON to its stdout for
each test that has ended, and ends itself, with all that it started, when its stdin is closed.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.util
import json
import multiprocessing
import os
import re
import resource
import selectors
import shutil
import signal
import sys
import tempfile
import time
import unittest
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from conformance import presented
from conformance.results import FAILED, HUNG, NOT_RUN, PASSED, SKIPPED, Result

GRACE = 20.0  # seconds that torch has after a test's time-out, to fetch where its ranks are
CLEAN = re.compile(r"\n*To execute this test, run the following.*", re.DOTALL)
RANK = re.compile(r"Process \d+ exited with error code \d+ and exception:")
SUITE = re.compile(r'distributed_test\.py", line (\d+)')
ERROR = re.compile(r"[\w.]+(Error|Exception|Exit|Interrupt|Skip)\b.*: ")
ENDED = re.compile(r"Expected exit code -?\d+ but got (-?\d+)")
TIMED_OUT = re.compile(r"terminated or timed out after")


@dataclass(frozen=True)
class Order:
    """What to run.

    Attributes:
        backend: its name.
        imported_as: the backend as which the suite is imported: it decides which tests run.
        module: is imported first, so that torch knows the backend; "" for none.
        world_size: how many ranks each test has.
        select: a regular expression that is found in the names of the tests to run.
        jobs: how many tests run at once.
        timeout: seconds a test.
        limit: seconds for all tests.
        logs: a folder for what the ranks of tests print that do not pass; "" for none.
    """

    backend: str
    imported_as: str
    module: str
    world_size: int
    select: str
    jobs: int
    timeout: float
    limit: float
    logs: str


def load(order: Order) -> type[unittest.TestCase]:
    """The class of torch's tests, told about the backend. SystemExit if torch does not know it."""
    if order.module and importlib.util.find_spec(order.module) is None:
        sys.exit(f"there is no module {order.module!r} to make {order.backend!r} known to torch")
    os.environ.update(
        BACKEND=order.imported_as,
        WORLD_SIZE=str(order.world_size),
        # Read when it is imported, to decide what runs; each test then has a file of its own.
        INIT_METHOD="file:///none",
        TEMP_DIR="/none",
        DISTRIBUTED_TESTS_DEFAULT_TIMEOUT=str(int(order.timeout)),
        PYTORCH_PRINT_REPRO_ON_FAILURE="0",
    )
    import torch
    import torch.distributed as dist

    if order.module:
        importlib.import_module(order.module)
    if order.backend not in dist.Backend.backend_list:
        known = ", ".join(dist.Backend.backend_list)
        sys.exit(f"torch knows no backend {order.backend!r}, but {known}: name its module with --module")
    from torch.testing._internal import common_distributed
    from torch.testing._internal.distributed import distributed_test as suite

    torch.set_num_threads(1)  # ranks share the cores; and fork copies no threads
    common_distributed.TIMEOUT_OVERRIDE.clear()  # some tests may take minutes there
    presented.present(suite, order.backend, order.imported_as)
    return _test_class(suite)


def _test_class(suite: Any) -> type[unittest.TestCase]:
    """As in torch's test_distributed_spawn.py, but that the ranks are forked, not spawned."""
    fork = multiprocessing.get_context("fork").Process

    class TestDistBackendWithSpawn(suite.TestDistBackend, suite.DistributedTest._DistTestBase):  # type: ignore[misc]
        def setUp(self) -> None:
            super().setUp()
            suite.INIT_METHOD = os.environ["INIT_METHOD"]  # a rank that is spawned reads it when it imports the suite
            self._start_processes(fork)
            self.all_ranks = list(self.processes)

    return TestDistBackendWithSpawn


def run_test(test_class: type[unittest.TestCase], name: str, timeout: float) -> Result:
    """Runs one test, in a process that is for nothing else."""
    test_class.setUpClass()
    case = test_class(name)
    outcome = unittest.TestResult()
    begun = time.monotonic()
    case.run(outcome)
    seconds = time.monotonic() - begun
    if outcome.skipped:
        return Result(name, SKIPPED, outcome.skipped[0][1], seconds)
    if failures := outcome.errors + outcome.failures:
        report = CLEAN.sub("", failures[0][1])
        if TIMED_OUT.search(report) and seconds >= timeout:
            return Result(name, HUNG, f"not done after {timeout:g} s", seconds, report)
        return Result(name, FAILED, summary(report), seconds, report)
    # torch looks at rank 0 alone: that another died at its end, it does not see.
    codes = {rank: process.exitcode for rank, process in enumerate(getattr(case, "all_ranks", []))}
    if wrong := {rank: code for rank, code in codes.items() if code != codes[0]}:
        return Result(name, FAILED, f"torch passes it, but ranks ended with exit codes {wrong}", seconds)
    return Result(name, PASSED, "", seconds)


def summary(report: str) -> str:
    """What each rank raised last, and from where in the suite, out of a report of torch's; the same thing once."""
    raised = []
    for of_rank in RANK.split(report)[1:] or [report]:
        error = line = ""
        for row in of_rank.splitlines():
            if found := SUITE.search(row):
                line = f" [line {found[1]}]"
            elif ERROR.match(row):
                error = row.strip() + line
            elif error and row.startswith("Expected ") and " but got " in row:
                error += f" {row}"
        if error:
            raised.append(error)
    return " | ".join(dict.fromkeys(raised))[:600] or report.strip().splitlines()[-1][:600]


@dataclass
class _Running:
    name: str
    pid: int
    folder: Path
    deadline: float
    begun: float
    killed: bool = False

    def kill(self) -> None:
        """The test's process and its ranks, which are in its group."""
        self.killed = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)


class Zygote:
    """Runs the tests of an order."""

    def __init__(self, order: Order, test_class: type[unittest.TestCase], folder: Path, answers: TextIO) -> None:
        self._order, self._test_class, self._folder, self._answers = order, test_class, folder, answers
        self._selector = selectors.DefaultSelector()
        self._selector.register(sys.stdin.fileno(), selectors.EVENT_READ)

    def run(self, names: list[str]) -> Iterator[Result]:
        """The results, as the tests end. Stops when stdin is closed."""
        waiting = deque(names)
        until = time.monotonic() + self._order.limit
        running: dict[int, _Running] = {}
        try:
            while waiting or running:
                if time.monotonic() > until:
                    yield from (Result(name, NOT_RUN, f"{self._order.limit:g} s were over") for name in waiting)
                    waiting.clear()
                while waiting and len(running) < self._order.jobs:
                    name = waiting.popleft()
                    why = getattr(getattr(self._test_class, name), "__unittest_skip_why__", None)
                    if why is not None:  # decided by a decorator: no process is needed
                        yield Result(name, SKIPPED, why)
                        continue
                    test = self._start(name)
                    watched = os.pidfd_open(test.pid)
                    running[watched] = test
                    self._selector.register(watched, selectors.EVENT_READ)
                ended = self._wait(running)
                if sys.stdin.fileno() in ended:
                    return
                for test in running.values():
                    if time.monotonic() > test.deadline and not test.killed:
                        test.kill()
                for watched in ended:
                    self._selector.unregister(watched)
                    os.close(watched)
                    yield self._collect(running.pop(watched))
        finally:
            for test in running.values():
                test.kill()

    def _wait(self, running: dict[int, _Running]) -> list[int]:
        """Descriptors of tests that have ended, or of stdin; none if it is time to look at the deadlines."""
        if not running:
            return []
        first = min(test.deadline for test in running.values())
        events = self._selector.select(min(1.0, max(0.0, first - time.monotonic())))
        return [key.fd for key, _ in events]

    def _start(self, name: str) -> _Running:
        folder = Path(tempfile.mkdtemp(prefix=f"{name[:60]}-", dir=self._folder))
        begun = time.monotonic()
        pid = os.fork()
        if pid == 0:
            self._lead(name, folder)
        return _Running(name, pid, folder, begun + self._order.timeout + GRACE, begun)

    def _lead(self, name: str, folder: Path) -> None:
        """In the process of one test: never returns."""
        try:
            os.setpgid(0, 0)
            os.close(self._answers.fileno())  # whoever reads them shall see that this process's parent has ended
            log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.environ["TMPDIR"] = str(folder)  # torch leaves files behind
            tempfile.tempdir = None
            result = run_test(self._test_class, name, self._order.timeout)
            (folder / "result").write_text(json.dumps(asdict(result)), encoding="utf-8")
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)

    def _collect(self, test: _Running) -> Result:
        """The result of a test whose process has ended; its ranks end now if they have not."""
        killed, seconds = test.killed, time.monotonic() - test.begun
        test.kill()
        os.waitpid(test.pid, 0)
        try:
            result = Result(**json.loads((test.folder / "result").read_text(encoding="utf-8")))
        except (OSError, ValueError):
            reason = f"not done after {self._order.timeout:g} s" if killed else "the process of the test died"
            result = Result(test.name, HUNG if killed else FAILED, reason, seconds)
        if result.outcome in (FAILED, HUNG):
            result = self._with_log(result, test.folder / "log")
        shutil.rmtree(test.folder, ignore_errors=True)
        return result

    def _with_log(self, result: Result, log: Path) -> Result:
        """The result with the end of what the ranks printed, which is kept as a whole if there is a folder for it."""
        text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
        if self._order.logs:
            kept = Path(self._order.logs)
            kept.mkdir(parents=True, exist_ok=True)
            name = f"{self._order.backend}-{self._order.world_size}-{result.name}.log"
            (kept / name).write_text(f"{result.details}\n\n{text}", encoding="utf-8")
        details = "\n".join([result.details, *text.splitlines()[-40:]])
        reason = result.reason
        if ended := ENDED.search(reason):  # outside of what torch catches: the rank has printed why
            reason = f"rank 0 ended with exit code {ended[1]}: {summary(text.strip() or 'it printed nothing')}"
        return replace(result, reason=reason, details=details[-8000:])


def main() -> None:
    """Runs the order of the command line."""
    order = Order(**json.loads(sys.argv[1]))
    answers = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)  # what imports print is no answer
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))  # tests that crash
    test_class = load(order)
    gc.collect()
    gc.freeze()  # else the first collection in each process copies all of torch's pages
    names = [name for name in unittest.TestLoader().getTestCaseNames(test_class) if re.search(order.select, name)]
    print(json.dumps({"torch": sys.modules["torch"].__version__, "tests": len(names)}), file=answers)
    with tempfile.TemporaryDirectory(prefix="conformance-", ignore_cleanup_errors=True) as folder:
        for result in Zygote(order, test_class, Path(folder), answers).run(names):
            print(json.dumps(asdict(result)), file=answers)


if __name__ == "__main__":
    main()
