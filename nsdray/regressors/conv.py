"""The paper's convolutional alternative: the GRU network with two 1-D convolutions before its second GRU."""
from __future__ import annotations

from torch import nn

from nsdray.regressors.gru import GRURegressor


class ConvRegressor(GRURegressor):
    """Z-scored betas (n_samples, n_voxels) to standardised targets (n_samples, n_targets), both float32.

    With h = hidden units a direction (100, even) and c = channels (16):

        BiGRU(n_voxels -> 2h), LayerNorm,
        Conv1d(1 -> c), ReLU, MaxPool(2), Conv1d(c -> 2c), ReLU, MaxPool(2), flattened: h/2 positions x 2c = hc,
        BiGRU(hc -> 2h), LayerNorm, Linear(2h -> 2h), BatchNorm, ReLU, Dropout, Linear(2h -> n_targets)

    which is 6h(n_voxels + h + 2) + 6h(hc + h + 2) + (6c^2 + 6c) + 2h(2h + 1) + 3 * 4h + (2h + 1) n_targets parameters:
    13,241,976 for subject 1's 15,724 voxels and the 13,344 latents of 15 layers.

    The paper (3.3.1): "a bidirectional GRU layer, followed by layer normalization [...] a convolutional block consisting
    of two 1D convolutional layers with ReLU activations and max pooling [...] A second bidirectional GRU layer,
    complemented by layer normalization [...] a fully connected module incorporating batch normalization and dropout".
    It gives no sizes and no parameter count. Chosen here:

    - hidden, Linear-BatchNorm-ReLU-Dropout-Linear and the sequence of one step are those of the GRU network (table 1);
      its dropout rate is not given either.
    - The convolutions slide over the first GRU's 2h outputs: over a sequence of one step they would see only padding,
      and there would be nothing to pool. Those outputs have no order of their own; training has to find one.
    - Kernels of 3 with padding 1, a pooling by 2 after each convolution, 16 and 32 channels.
    - The second GRU reads all positions in one step, so each keeps its own weights, none is far from the output and the
      cost stays that of the GRU network. The recurrent matrices count as parameters and never act, as there.
    """

    def __init__(self, n_voxels: int, n_targets: int, hidden: int = 100, dropout: float = 0.2, channels: int = 16):
        super().__init__(n_voxels, n_targets, hidden, dropout)
        if hidden % 2:
            raise ValueError(f"ConvRegressor: hidden is {hidden}, must be even: 2 * hidden outputs are halved twice")
        if channels < 1:
            raise ValueError(f"ConvRegressor: channels is {channels}, must be at least 1")
        width = hidden * channels
        block = nn.Sequential(  # (n_samples, 1, 2h): the sequence of one step is the first convolution's one channel
            nn.Conv1d(1, channels, kernel_size=3, padding=1), nn.ReLU(), nn.MaxPool1d(2),
            nn.Conv1d(channels, 2 * channels, kernel_size=3, padding=1), nn.ReLU(), nn.MaxPool1d(2),
            nn.Flatten(), nn.Unflatten(1, (1, width)),  # (n_samples, 2c, h/2) to one step (n_samples, 1, hc)
        )  # fmt: skip
        self.gru2 = nn.Sequential(block, nn.GRU(width, hidden, batch_first=True, bidirectional=True))
