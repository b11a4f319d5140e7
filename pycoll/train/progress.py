"""What a person sees of a run, on rank 0: a progress bar (lines where there is no terminal), TensorBoard, a summary."""

import json
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from torch.utils.tensorboard import SummaryWriter

from pycoll.errors import Error

LINE_EVERY = 25
"""Steps between lines where there is no terminal."""
RECENT = 20
"""Steps over which tokens/s is measured."""


class Reporter:
    """Shows a run that goes from step `first` to `last` with `tokens_per_step` tokens of all ranks in each."""

    def __init__(self, folder: Path, first: int, last: int, tokens_per_step: int) -> None:
        self._console = Console()
        self._folder, self._first, self._last, self._tokens_per_step = folder, first, last, tokens_per_step
        with self._writable():
            self._writer = SummaryWriter(str(folder), purge_step=first + 1)
        self._began = time.monotonic()
        self._times = deque([self._began], maxlen=RECENT + 1)
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
        times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        self._bar = Progress(*columns, *times, console=self._console) if self._console.is_terminal else None
        if self._bar:
            self._task = self._bar.add_task("", total=last, completed=first)

    def start(self) -> None:
        """Training begins now."""
        self._began = time.monotonic()
        self._times = deque([self._began], maxlen=RECENT + 1)
        if self._bar:
            self._bar.start()

    def step(self, step: int, loss: float, rate: float, norm: float) -> None:
        """Step number `step` (from 1) is done: training loss, learning rate, norm of the gradient before clipping."""
        self._times.append(time.monotonic())
        speed = self._tokens_per_step * (len(self._times) - 1) / (self._times[-1] - self._times[0])
        scalars = {"loss/train": loss, "learning_rate": rate, "gradient_norm": norm, "tokens_per_s": speed}
        self._write(scalars, step)
        text = f"loss {loss:.3f}  {speed:,.0f} tokens/s"
        if self._bar:
            self._bar.update(self._task, completed=step, description=text)
        elif step % LINE_EVERY == 0 or step in (self._first + 1, self._last):
            left = (self._last - step) * (self._times[-1] - self._began) / (step - self._first)
            self.note(f"step {step}/{self._last}  {text}  {left:.0f} s left")

    def validation(self, step: int, verdict: dict[str, float]) -> None:
        """The task's verdict on the validation data after `step` steps."""
        self._write({f"{name}/validation": value for name, value in verdict.items()}, step)
        measures = ", ".join(f"{name} {value:.3f}" for name, value in verdict.items())
        self.note(f"step {step}/{self._last}  validation {measures}")

    def note(self, text: str) -> None:
        """One line."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def sample(self, text: str) -> None:
        """Text that the model wrote."""
        self._console.print(Panel(Text(text), title="a sample of generated text"))

    def summary(self, rows: dict[str, tuple[str, Any]]) -> None:
        """The result: name -> (what is shown, the value itself); the values also go to summary.json."""
        table = Table(show_header=False)
        for name, (shown, _) in rows.items():
            table.add_row(name, shown)
        self._console.print(table)
        values = {name: value for name, (_, value) in rows.items()}
        with self._writable():
            (self._folder / "summary.json").write_text(json.dumps(values, indent=2) + "\n")

    def close(self) -> None:
        """Gives the terminal back and writes the last events."""
        if self._bar:
            self._bar.stop()
        with self._writable():
            self._writer.close()

    def _write(self, scalars: dict[str, float], step: int) -> None:
        with self._writable():
            for name, value in scalars.items():
                self._writer.add_scalar(name, value, step)

    @contextmanager
    def _writable(self) -> Iterator[None]:
        """Around what writes to the folder; what the writer's thread could not write is told here too, at a later
        call."""
        try:
            yield
        except OSError as error:
            what = f"{self._folder} cannot be written to ({error})"
            raise Error(f"{what}: the run ends; make room, and resume from its last checkpoint") from error
