"""What all networks share: an input layer that knows the voxels, below a trunk that knows none."""
from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn


class Regressor(nn.Module):
    """Z-scored betas (n_samples, n_voxels) to standardised targets (n_samples, n_targets), both float32.

    A network names its input layer by INPUT, and says by `read` and `trunk` what is made of betas there and above.
    """

    INPUT: ClassVar[str]
    """The layer that knows the voxels; everything above it knows none."""

    def __init__(self, dropout: float, **counts: int):
        """Check the sizes; counts: n_voxels, n_targets and whatever else must be at least 1."""
        super().__init__()
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"{type(self).__name__}: {name} is {value}, must be at least 1")
        if not 0 <= dropout < 1:
            raise ValueError(f"{type(self).__name__}: dropout is {dropout}, must be in [0, 1)")
        self.n_voxels = counts["n_voxels"]

    def forward(self, betas: torch.Tensor) -> torch.Tensor:
        if betas.ndim != 2 or betas.shape[1] != self.n_voxels:
            raise ValueError(
                f"betas have shape {tuple(betas.shape)}, this network wants (n_samples, {self.n_voxels}); "
                "were they cut with another subject's voxels?"
            )
        return self.trunk(self.read(self.get_submodule(self.INPUT), betas))

    @staticmethod
    def read(layer: nn.Module, betas: torch.Tensor) -> torch.Tensor:
        """What an input layer makes of betas."""
        raise NotImplementedError

    def trunk(self, x: torch.Tensor) -> torch.Tensor:
        """An input layer's output to standardised targets."""
        raise NotImplementedError
