"""The reference models that `pycoll train` trains."""

from pycoll.models.encoder import Encoder, EncoderConfig
from pycoll.models.flops import measured_peak, model_flops_utilization, peak_of, training_flops_per_token
from pycoll.models.gpt import GPT, GPTConfig
from pycoll.models.presets import PRESETS, count_parameters

__all__ = [
    "GPT",
    "PRESETS",
    "Encoder",
    "EncoderConfig",
    "GPTConfig",
    "count_parameters",
    "measured_peak",
    "model_flops_utilization",
    "peak_of",
    "training_flops_per_token",
]
