"""The reference trainer: `pycoll train`, or `python -m pycoll.train`, or either through torchrun.

config: the settings; main: checks them, then launches the processes or is one; trainer: what each process does;
optimization: AdamW and its schedule; progress: what a person sees of it; stop: Ctrl-C.
"""

from pycoll.train.config import ConfigError, TrainConfig

__all__ = ["ConfigError", "TrainConfig"]
