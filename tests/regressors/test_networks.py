"""What every network promises to the training loop, the sizes they state, and their arithmetic against NumPy."""
from __future__ import annotations

import numpy as np
import pytest
import torch

from nsdray.regressors import REGRESSORS
from nsdray.regressors.conv import ConvRegressor
from nsdray.regressors.mlp import MLPRegressor
from nsdray.regressors.transformer import TransformerRegressor

N_VOXELS, N_TARGETS = 11, 7
# Every size differs from the others, so that none can stand in for another.
SMALL = {
    "gru": {"hidden": 6},
    "conv": {"hidden": 6, "channels": 5},
    "transformer": {"hidden": 6, "width": 8, "n_heads": 2, "n_blocks": 3},
    "mlp": {"hidden": 6, "n_hidden_layers": 3},
}


def small(name: str, dropout: float = 0.0) -> torch.nn.Module:
    torch.manual_seed(0)
    return REGRESSORS[name](N_VOXELS, N_TARGETS, dropout=dropout, **SMALL[name])


def shaken(name: str) -> torch.nn.Module:
    """Float64, in evaluation mode, with no weight, bias or batch statistic left at its initial 0 or 1."""
    model = small(name).double()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.7)
    model(betas(20).double())
    return model.eval()


def betas(n_samples: int) -> torch.Tensor:
    return torch.randn(n_samples, N_VOXELS, generator=torch.Generator().manual_seed(1))


# ---- sizes: the docstrings' formulas


def gru_frame(v, t, h, width, inside):
    """Table 1 with `inside` parameters between the GRUs, the second of which reads `width` values."""
    return 6 * h * (v + h + 2) + 6 * h * (width + h + 2) + inside + 2 * h * (2 * h + 1) + 3 * 4 * h + (2 * h + 1) * t


def conv_size(v, t, hidden=100, channels=16):
    return gru_frame(v, t, hidden, hidden * channels, 6 * channels**2 + 6 * channels)


def transformer_size(v, t, hidden=100, width=32, n_heads=4, n_blocks=2):
    h, w = hidden, width
    return gru_frame(v, t, h, h * w // 2, 5 * w + h * w // 2 + n_blocks * (12 * w**2 + 13 * w) + 2 * w)


def mlp_size(v, t, hidden=416, n_hidden_layers=2):
    h, k = hidden, n_hidden_layers
    return h * (v + 1) + (k - 1) * h * (h + 1) + 2 * h * k + (h + 1) * t


@pytest.mark.parametrize(
    "name, formula, expected",
    [("conv", conv_size, 13_241_976), ("transformer", transformer_size, 13_267_576), ("mlp", mlp_size, 12_281_184)],
)
def test_parameter_counts_of_the_docstrings(name, formula, expected):
    with torch.device("meta"):
        model = REGRESSORS[name](15724, 13344)
    assert sum(p.numel() for p in model.parameters()) == formula(15724, 13344) == expected
    assert f"{expected:,}" in REGRESSORS[name].__doc__
    assert model(torch.empty(2, 15724, device="meta")).shape == (2, 13344)
    assert sum(p.numel() for p in small(name).parameters()) == formula(N_VOXELS, N_TARGETS, **SMALL[name])


# ---- the contract


@pytest.mark.parametrize("name", REGRESSORS)
def test_deterministic_given_the_seed(name):
    outputs = []
    for _ in range(2):
        model = small(name, dropout=0.5)  # seeds; then initial weights and dropout draw
        outputs.append(model(betas(8)))
    assert torch.equal(*outputs)
    assert not torch.equal(model(betas(8)), model(betas(8))), "dropout does nothing in training mode"
    model.eval()
    assert torch.equal(model(betas(8)), model(betas(8)))


@pytest.mark.parametrize("name", REGRESSORS)
def test_gradients_reach_every_parameter(name):
    model = small(name).double()
    model(betas(16).double()).square().mean().backward()
    largest = {key: float(p.grad.abs().max()) for key, p in model.named_parameters()}
    silent = {key for key, value in largest.items() if value < 1e-12}
    # These count as parameters and cannot act: recurrent matrices multiply the zero state of a sequence of one step, and
    # BatchNorm subtracts what the biases before it add to every sample alike.
    assert silent == {key for key in largest if "weight_hh" in key or key in ("norm2.bias", "linear.bias")}


@pytest.mark.parametrize("name", REGRESSORS)
def test_bf16_autocast(name):
    model = small(name)
    full = model(betas(32))
    with torch.autocast("cpu", torch.bfloat16):
        half = model(betas(32))
    assert half.shape == full.shape and half.dtype == torch.bfloat16
    assert (half.float() - full).std() < 0.1 * full.std()  # 0.003 to 0.03 over networks and seeds
    half.float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", REGRESSORS)
def test_a_batch_of_two_and_one_image_alone(name):
    model = small(name)
    assert model(betas(2)).isfinite().all()
    model = shaken(name)
    with torch.no_grad():
        together = model(betas(9).double())
        alone = torch.cat([model(row[None]) for row in betas(9).double()])
    torch.testing.assert_close(alone, together, rtol=1e-12, atol=1e-12)
    assert together.std(0).min() > 1e-3, "the output does not depend on the betas"


def test_mlp_has_no_batch_statistics():
    model = small("mlp").train()
    torch.testing.assert_close(model(betas(9))[3:5], model(betas(9)[3:5]))
    assert not list(model.buffers())


# ---- arithmetic, one sample in evaluation mode


def sigmoid(v):
    return 1 / (1 + np.exp(-v))


def linear(weights, name, x):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def layer_norm(weights, name, x):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def bigru(weights, name, x):
    """Cho et al. 2014 with the state at 0."""
    out = []
    for side in ("l0", "l0_reverse"):
        r_x, z_x, n_x = np.split(weights[f"{name}.weight_ih_{side}"] @ x + weights[f"{name}.bias_ih_{side}"], 3)
        r_h, z_h, n_h = np.split(weights[f"{name}.bias_hh_{side}"], 3)
        out.append((1 - sigmoid(z_x + z_h)) * np.tanh(n_x + sigmoid(r_x + r_h) * n_h))
    return np.concatenate(out)


def convolution_by_hand(weights, x):
    """(2h,) to (2c * h/2,): two convolutions, each with ReLU and the larger of every two neighbours."""
    x = x[None]  # (channels, positions)
    for name in ("gru2.0.0", "gru2.0.3"):
        kernels, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
        padded = np.pad(x, ((0, 0), (1, 1)))
        out = np.empty((len(kernels), x.shape[1]))
        for k in range(len(kernels)):
            for i in range(x.shape[1]):
                out[k, i] = (kernels[k] * padded[:, i : i + 3]).sum() + bias[k]
        x = np.maximum(np.maximum(out[:, 0::2], out[:, 1::2]), 0)
    return x.ravel()


def attention_by_hand(weights, x, n_heads=2, n_blocks=3):
    """(2h,) to (h/2 * w,): Vaswani et al. 2017's encoder, normalised before each branch, over tokens of four values."""
    x = linear(weights, "gru2.0.embed", x.reshape(-1, 4)) + weights["gru2.0.position"]  # (tokens, w)
    for i in range(n_blocks):
        name = f"gru2.0.blocks.{i}"
        y = layer_norm(weights, f"{name}.norm1", x)
        stacked = y @ weights[f"{name}.self_attn.in_proj_weight"].T + weights[f"{name}.self_attn.in_proj_bias"]
        heads = []
        for q, k, v in zip(*(np.split(part, n_heads, axis=1) for part in np.split(stacked, 3, axis=1))):
            scores = np.exp(q @ k.T / np.sqrt(q.shape[1]))
            heads.append(scores / scores.sum(1, keepdims=True) @ v)
        x = x + linear(weights, f"{name}.self_attn.out_proj", np.concatenate(heads, axis=1))
        y = layer_norm(weights, f"{name}.norm2", x)
        x = x + linear(weights, f"{name}.linear2", np.maximum(linear(weights, f"{name}.linear1", y), 0))
    return layer_norm(weights, f"gru2.0.blocks.{n_blocks}", x).ravel()


def between_grus_by_hand(weights, x, block):
    x = layer_norm(weights, "norm1", bigru(weights, "gru1", x))
    x = layer_norm(weights, "norm2", bigru(weights, "gru2.1", block(weights, x)))
    x = linear(weights, "linear", x) - weights["head.0.running_mean"]
    x = x / np.sqrt(weights["head.0.running_var"] + 1e-5) * weights["head.0.weight"] + weights["head.0.bias"]
    return linear(weights, "head.3", np.maximum(x, 0))


def mlp_by_hand(weights, x):
    for i in (0, 4, 8):
        x = np.maximum(layer_norm(weights, f"layers.{i + 1}", linear(weights, f"layers.{i}", x)), 0)
    return linear(weights, "layers.12", x)


@pytest.mark.parametrize(
    "name, by_hand",
    [
        ("conv", lambda weights, x: between_grus_by_hand(weights, x, convolution_by_hand)),
        ("transformer", lambda weights, x: between_grus_by_hand(weights, x, attention_by_hand)),
        ("mlp", mlp_by_hand),
    ],
)
def test_forward_by_hand(name, by_hand):
    model = shaken(name)
    weights = {k: v.numpy() for k, v in model.state_dict().items()}
    with torch.no_grad():
        expected = np.stack([by_hand(weights, x) for x in betas(3).double().numpy()])
        np.testing.assert_allclose(model(betas(3).double()).numpy(), expected, rtol=1e-9, atol=1e-11)


def test_transformer_blocks_start_with_different_weights():
    first, second = (block.linear1.weight for block in small("transformer").gru2[0].blocks[:2])
    assert not torch.equal(first, second)


# ---- errors


@pytest.mark.parametrize("name", REGRESSORS)
@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"n_voxels": 0}, "n_voxels is 0, must be at least 1"),
        ({"n_targets": -1}, "n_targets is -1, must be at least 1"),
        ({"hidden": 0}, "hidden is 0, must be at least 1"),
        ({"dropout": 1.0}, r"dropout is 1.0, must be in \[0, 1\)"),
    ],
)
def test_impossible_sizes(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        REGRESSORS[name](**{"n_voxels": 5, "n_targets": 5} | arguments)


@pytest.mark.parametrize(
    "network, arguments, message",
    [
        (ConvRegressor, {"hidden": 5}, "ConvRegressor: hidden is 5, must be even"),
        (ConvRegressor, {"channels": 0}, "channels is 0, must be at least 1"),
        (TransformerRegressor, {"hidden": 5}, "TransformerRegressor: hidden is 5, must be even"),
        (TransformerRegressor, {"n_blocks": 0}, "n_blocks is 0, must be at least 1"),
        (TransformerRegressor, {"n_heads": 0}, "n_heads is 0, must be at least 1"),
        (TransformerRegressor, {"width": 30}, "width is 30, must be a multiple of n_heads, 4"),
        (MLPRegressor, {"n_hidden_layers": 0}, "n_hidden_layers is 0, must be at least 1"),
    ],
)
def test_impossible_sizes_of_one_network(network, arguments, message):
    with pytest.raises(ValueError, match=message):
        network(5, 5, **arguments)


@pytest.mark.parametrize("name", REGRESSORS)
def test_betas_of_another_subject(name):
    with pytest.raises(ValueError, match=r"betas have shape \(2, 4\), this network wants \(n_samples, 11\)"):
        small(name)(torch.zeros(2, 4))
