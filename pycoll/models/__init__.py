"""The reference models that `pycoll train` trains."""

from pycoll.models.gpt import GPT, GPTConfig

__all__ = ["GPT", "GPTConfig"]
