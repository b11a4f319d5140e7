"""The command: `python -m tests.conformance`, or `python tests/conformance` from anywhere."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from conformance.main import main

sys.exit(main())
