"""Runs a command under the test double, built in FOLDER: `python tests/fake_cuda FOLDER DEVICES COMMAND...`."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from fake_cuda import build, missing

folder, devices, *command = sys.argv[1:]
if reason := missing():
    sys.exit(f"fake_cuda: {reason}")
os.execvpe(command[0], command, {**os.environ, **build(Path(folder), int(devices))})
