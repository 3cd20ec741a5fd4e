"""A plain multilayer perceptron: what the paper's networks must beat to be worth their gates."""
from __future__ import annotations

import torch
from torch import nn

from nsdray.regressors.base import Regressor


class MLPRegressor(Regressor):
    """Z-scored betas (n_samples, n_voxels) to standardised targets (n_samples, n_targets), both float32.

    With h = hidden (416) and k = n_hidden_layers (2):

        Linear(n_voxels -> h), LayerNorm, ReLU, Dropout, (k - 1) x [Linear(h -> h), LayerNorm, ReLU, Dropout],
        Linear(h -> n_targets)

    which is h(n_voxels + 1) + (k - 1) h(h + 1) + 2hk + (h + 1) n_targets parameters: 12,281,184 for subject 1's
    15,724 voxels and the 13,344 latents of 15 layers.

    Not in the paper: a control, all of it chosen here. The default width gives about as many parameters as the GRU
    network's 12,400,344, so that size does not explain a difference. LayerNorm in place of BatchNorm leaves it without
    batch statistics: with dropout 0 a sample's prediction and gradient do not depend on the batch that it is in, so
    training does not depend on how a batch is dealt out to workers.
    """

    INPUT = "layers.0"

    def __init__(self, n_voxels: int, n_targets: int, hidden: int = 416, dropout: float = 0.2, n_hidden_layers: int = 2):
        super().__init__(dropout, n_voxels=n_voxels, n_targets=n_targets, hidden=hidden, n_hidden_layers=n_hidden_layers)
        self.layers = nn.Sequential()
        for n_inputs in [n_voxels] + [hidden] * (n_hidden_layers - 1):
            self.layers.extend([nn.Linear(n_inputs, hidden), nn.LayerNorm(hidden), nn.ReLU(), nn.Dropout(dropout)])
        self.layers.append(nn.Linear(hidden, n_targets))

    @staticmethod
    def read(layer: nn.Module, betas: torch.Tensor) -> torch.Tensor:
        """What an input layer makes of betas, (n_samples, h)."""
        return layer(betas)

    def trunk(self, x: torch.Tensor) -> torch.Tensor:
        """An input layer's output to standardised targets."""
        return self.layers[1:](x)
