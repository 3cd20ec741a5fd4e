"""The paper's first-stage network: two bidirectional GRUs and two linear layers over one vector of betas."""
from __future__ import annotations

import torch
from torch import nn

from nsdray.regressors.base import Regressor


class GRURegressor(Regressor):
    """Z-scored betas (n_samples, n_voxels) to standardised targets (n_samples, n_targets), both float32.

    Table 1 of the paper, with h = hidden units a direction (100):

        BiGRU(n_voxels -> 2h), LayerNorm, BiGRU(2h -> 2h), LayerNorm, Linear(2h -> 2h),
        BatchNorm, ReLU, Dropout, Linear(2h -> n_targets)

    which is 6h(n_voxels + h + 2) + 6h(3h + 2) + 2h(2h + 1) + 3 * 4h + (2h + 1) n_targets parameters: 12,400,344 for
    subject 1's 15,724 voxels and the 13,344 latents of 15 layers.

    The sequence is one step long and starts from zero, so the recurrent matrices multiply zeros: they count as
    parameters and never act; each direction is a gated layer (1 - z) * n. The paper does not give the dropout rate.
    """

    INPUT = "gru1"

    def __init__(self, n_voxels: int, n_targets: int, hidden: int = 100, dropout: float = 0.2):
        super().__init__(dropout, n_voxels=n_voxels, n_targets=n_targets, hidden=hidden)
        self.gru1 = nn.GRU(n_voxels, hidden, batch_first=True, bidirectional=True)
        self.norm1 = nn.LayerNorm(2 * hidden)
        self.gru2 = nn.GRU(2 * hidden, hidden, batch_first=True, bidirectional=True)
        self.norm2 = nn.LayerNorm(2 * hidden)
        self.linear = nn.Linear(2 * hidden, 2 * hidden)
        self.head = nn.Sequential(
            nn.BatchNorm1d(2 * hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(2 * hidden, n_targets)
        )

    @staticmethod
    def read(layer: nn.Module, betas: torch.Tensor) -> torch.Tensor:
        """What an input layer makes of betas: a sequence of one step, (n_samples, 1, 2h)."""
        return layer(betas.unsqueeze(1))[0]

    def trunk(self, x: torch.Tensor) -> torch.Tensor:
        """An input layer's output to standardised targets."""
        x = self.norm2(self.gru2(self.norm1(x))[0])
        return self.head(self.linear(x).squeeze(1))
