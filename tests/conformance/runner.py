"""Starts a zygote for a backend and a world size, and hears what becomes of the tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from conformance.results import Result, Run
from conformance.zygote import Order

TESTS = Path(__file__).resolve().parent.parent


class ZygoteFailed(Exception):
    """The suite could not be imported, or its process died."""


def run_suite(order: Order, *, gpus: bool, begin: Callable[[int], object], tick: Callable[[Result], object]) -> Run:
    """Runs an order.

    Args:
        order: what to run.
        gpus: let the tests see GPUs.
        begin: is called with the number of tests before the first.
        tick: is called with each result.

    Raises:
        ZygoteFailed: with the end of what it printed.
    """
    # One thread a process: the ranks share the cores, and what has threads forks badly.
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    if not gpus:
        environ["CUDA_VISIBLE_DEVICES"] = ""
    run = Run(order.backend, order.world_size)
    begun = time.monotonic()
    command = [sys.executable, "-m", "conformance.zygote", json.dumps(asdict(order))]
    with (
        tempfile.TemporaryFile("w+", errors="replace") as printed,
        subprocess.Popen(
            command, cwd=TESTS, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=printed, text=True
        ) as zygote,
    ):
        assert zygote.stdin and zygote.stdout, "they are pipes"
        try:
            hello = json.loads(zygote.stdout.readline() or "{}")
            expected = hello.get("tests", -1)
            if expected >= 0:
                run.torch = hello["torch"]
                begin(expected)
            for line in zygote.stdout:
                result = Result(**json.loads(line))
                run.results[result.name] = result
                tick(result)
        finally:
            zygote.stdin.close()  # it ends now, with all that it started
        if zygote.wait() != 0 or len(run.results) != expected:
            printed.seek(0)
            raise ZygoteFailed(
                "\n".join(printed.read().splitlines()[-15:]) or f"it ended with status {zygote.returncode}"
            )
    run.results = dict(sorted(run.results.items()))
    run.seconds = time.monotonic() - begun
    return run
