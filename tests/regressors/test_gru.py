"""The network's size, and its arithmetic against NumPy."""
from __future__ import annotations

import numpy as np
import pytest
import torch

from nsdray.regressors import REGRESSORS
from nsdray.regressors.gru import GRURegressor


@pytest.mark.parametrize(
    "n_voxels, n_targets, expected",
    [(15724, 13344, 12_400_344), (14278, 13344, 11_532_744), (13039, 13344, 10_789_344), (12682, 13344, 10_575_144)],
)
def test_parameter_count_of_the_paper(n_voxels, n_targets, expected):
    with torch.device("meta"):
        model = REGRESSORS["gru"](n_voxels, n_targets)
    assert sum(p.numel() for p in model.parameters()) == expected
    assert model(torch.empty(2, n_voxels, device="meta")).shape == (2, n_targets)


def by_hand(weights: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """One sample through table 1, in evaluation mode. The GRU's equations are those of Cho et al. 2014 with h = 0."""

    def sigmoid(v):
        return 1 / (1 + np.exp(-v))

    def bigru(name, x):
        out = []
        for side in ("l0", "l0_reverse"):
            from_x = weights[f"{name}.weight_ih_{side}"] @ x + weights[f"{name}.bias_ih_{side}"]
            from_h = weights[f"{name}.bias_hh_{side}"]
            (r_x, z_x, n_x), (r_h, z_h, n_h) = np.split(from_x, 3), np.split(from_h, 3)
            candidate = np.tanh(n_x + sigmoid(r_x + r_h) * n_h)
            out.append((1 - sigmoid(z_x + z_h)) * candidate)
        return np.concatenate(out)

    def affine(name, x, mean, variance):
        return (x - mean) / np.sqrt(variance + 1e-5) * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    for i in (1, 2):
        x = bigru(f"gru{i}", x)
        x = affine(f"norm{i}", x, x.mean(), x.var())
    x = weights["linear.weight"] @ x + weights["linear.bias"]
    x = np.maximum(affine("head.0", x, weights["head.0.running_mean"], weights["head.0.running_var"]), 0)
    return weights["head.3.weight"] @ x + weights["head.3.bias"]


def test_forward_by_hand():
    torch.manual_seed(0)
    model = GRURegressor(11, 6, hidden=4).double()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.7)
    model(torch.randn(20, 11, dtype=torch.float64))  # moves BatchNorm's statistics off 0 and 1
    model.eval()
    betas = torch.randn(3, 11, dtype=torch.float64)
    weights = {k: v.numpy() for k, v in model.state_dict().items()}
    with torch.no_grad():
        expected = np.stack([by_hand(weights, x) for x in betas.numpy()])
        np.testing.assert_allclose(model(betas).numpy(), expected, rtol=1e-10, atol=1e-12)


def test_errors():
    with pytest.raises(ValueError, match="n_voxels is 0, must be at least 1"):
        GRURegressor(0, 5)
    with pytest.raises(ValueError, match=r"dropout is 1.0, must be in \[0, 1\)"):
        GRURegressor(5, 5, dropout=1.0)
    with pytest.raises(ValueError, match=r"betas have shape \(2, 4\), this network wants \(n_samples, 5\)"):
        GRURegressor(5, 5)(torch.zeros(2, 4))
