"""`python -m pycoll.train` is `pycoll train`."""

import sys

from pycoll.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
