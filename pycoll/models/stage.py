"""A run of a GPT's blocks, for a pipeline: the first stage has the embedding before it, the last one the head after it.

Parameters keep the names that they have in the whole model. The tied matrix lies on the first and on the last stage.
"""

from torch import Tensor, nn

from pycoll.models.gpt import GPT, run_blocks


class GPTStage(nn.Module):
    """Stage `index` of `count`, made of the modules of `model`; as the only one it is all of it."""

    def __init__(self, model: GPT, index: int, count: int) -> None:
        super().__init__()
        n_layer = len(model.blocks)
        mine = range(index * n_layer // count, (index + 1) * n_layer // count)
        self.checkpoint_activations = model.checkpoint_activations
        self.is_first, self.is_last = index == 0, index == count - 1
        if self.is_first:
            self.embedding: nn.Module = model.embedding
        elif self.is_last:
            self.embedding = nn.ModuleDict({"token": model.embedding.token})
        self.blocks = nn.ModuleDict({str(i): model.blocks[i] for i in mine})
        if self.is_last:
            self.head = model.head

    def forward(self, x: Tensor) -> Tensor:
        """(B, T) int64 on the first stage, else (B, T, D) -> (B, T, V) on the last one, else (B, T, D)."""
        if self.is_first:
            x = self.embedding(x)
        x = run_blocks(self.blocks.values(), x, again=self.checkpoint_activations)
        return self.head(x, self.tied) if self.is_last else x

    @property
    def tied(self) -> nn.Parameter:
        """The matrix that the first and the last stage share: (V, D)."""
        token = self.embedding.get_submodule("token")
        return token.get_parameter("weight")
