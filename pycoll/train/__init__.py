"""The reference trainer: `pycoll train`, or `python -m pycoll.train`, or either through torchrun.

config: the settings; main: checks them, then launches the processes or is one; trainer: what each process does;
device: where it computes; parallel: who averages gradients and updates weights, in which dtype; optimization: AdamW's
settings and schedule; plan: what ranks will need and send, before a run; measure: what they did; progress: what a
person sees of it; stop: Ctrl-C.
"""

from pycoll.train.config import ConfigError, TrainConfig

__all__ = ["ConfigError", "TrainConfig"]
