"""The paper's transformer alternative: the GRU network with self-attention between features before its second GRU."""
from __future__ import annotations

import torch
from torch import nn

from nsdray.regressors.gru import GRURegressor

PATCH = 4
"""Features a token is made of: as many as the convolutional network's two poolings merge into a position."""


class FeatureAttention(nn.Module):
    """Pre-norm transformer encoder over n_features values, cut into tokens of `PATCH`.

    (n_samples, 1, n_features) to (n_samples, 1, n_features / PATCH * width), float32.
    """

    def __init__(self, n_features: int, width: int, n_heads: int, n_blocks: int):
        super().__init__()
        n_tokens = n_features // PATCH
        self.embed = nn.Linear(PATCH, width)
        self.position = nn.Parameter(0.02 * torch.randn(n_tokens, width))
        # One layer at a time: nn.TransformerEncoder copies a single layer, so all of them would start with equal weights.
        self.blocks = nn.Sequential(
            *(nn.TransformerEncoderLayer(width, n_heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
              for _ in range(n_blocks)),
            nn.LayerNorm(width),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.embed(x.unflatten(2, (-1, PATCH)).squeeze(1)) + self.position  # (n_samples, n_tokens, width)
        return self.blocks(tokens).flatten(1).unsqueeze(1)


class TransformerRegressor(GRURegressor):
    """Z-scored betas (n_samples, n_voxels) to standardised targets (n_samples, n_targets), both float32.

    With h = hidden units a direction (100, even), w = width of a token (32) and b = n_blocks (2):

        BiGRU(n_voxels -> 2h), LayerNorm,
        h/2 tokens of 4 features each: Linear(4 -> w) + position, b x [x + Attention(LayerNorm(x)),
        x + Linear(4w -> w)(ReLU(Linear(w -> 4w)(LayerNorm(x))))], LayerNorm, flattened: hw/2,
        BiGRU(hw/2 -> 2h), LayerNorm, Linear(2h -> 2h), BatchNorm, ReLU, Dropout, Linear(2h -> n_targets)

    which is 6h(n_voxels + h + 2) + 6h(hw/2 + h + 2) + (5w + hw/2 + b(12w^2 + 13w) + 2w) + 2h(2h + 1) + 3 * 4h
    + (2h + 1) n_targets parameters: 13,267,576 for subject 1's 15,724 voxels and the 13,344 latents of 15 layers.

    The paper (3.3.1): it "mirrored the CNN-based design, replacing the convolutional block with a transformer module. This
    module leveraged multi-head self-attention to model long-range dependencies and captured contextual relationships
    between features. Residual connections and layer normalization were incorporated". It gives no sizes and no parameter
    count. Chosen here:

    - Everything outside the module is `ConvRegressor`'s, with its reasons; dropout, of an unknown rate, is only in the
      fully connected module, the one place where the paper puts it, so it means the same for every network.
    - Tokens are groups of 4 of the first GRU's 2h outputs, with learned positions: over the sequence of one step attention
      would have nothing to attend to. There are as many tokens, and as wide, as the convolutional block's positions.
    - Two blocks for its two convolutions, 4 heads, ReLU, a feed-forward layer 4 times as wide. LayerNorm comes before
      each residual branch and once at the end, rather than after each sum: that trains without a long warm-up.
    """

    def __init__(
        self,
        n_voxels: int,
        n_targets: int,
        hidden: int = 100,
        dropout: float = 0.2,
        width: int = 32,
        n_heads: int = 4,
        n_blocks: int = 2,
    ):
        super().__init__(n_voxels, n_targets, hidden, dropout)
        if hidden % 2:
            raise ValueError(f"TransformerRegressor: hidden is {hidden}, must be even: tokens are {PATCH} of 2 * hidden outputs")
        for name, value in {"width": width, "n_heads": n_heads, "n_blocks": n_blocks}.items():
            if value < 1:
                raise ValueError(f"TransformerRegressor: {name} is {value}, must be at least 1")
        if width % n_heads:
            raise ValueError(f"TransformerRegressor: width is {width}, must be a multiple of n_heads, {n_heads}")
        self.gru2 = nn.Sequential(
            FeatureAttention(2 * hidden, width, n_heads, n_blocks),
            nn.GRU(hidden // 2 * width, hidden, batch_first=True, bidirectional=True),
        )
