"""A shared network is its subjects' plain networks, one trunk in common, and its gradient is the sum of theirs."""
from __future__ import annotations

import pytest
import torch

from nsdray.regressors import REGRESSORS
from nsdray.regressors.shared import SharedRegressor, is_trunk, pack, subject_state, with_trunk

N_VOXELS, N_TARGETS, SIZES = (11, 7, 9), 5, {"hidden": 6, "dropout": 0.0}


def shared(name: str) -> SharedRegressor:
    torch.manual_seed(0)
    return SharedRegressor(REGRESSORS[name], N_VOXELS, N_TARGETS, **SIZES)


def plain(name: str, model: SharedRegressor, place: int) -> torch.nn.Module:
    network = REGRESSORS[name](N_VOXELS[place], N_TARGETS, **SIZES)
    network.load_state_dict(subject_state(model.state_dict(), place, network.INPUT))
    return network


def betas() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, n_voxels, generator=generator) for n, n_voxels in zip((4, 2, 3), N_VOXELS)]


@pytest.mark.parametrize("name", REGRESSORS)
def test_each_subject_s_part_is_a_plain_network(name):
    model = shared(name)
    model(pack(betas()))  # batch statistics
    model.eval()
    with torch.no_grad():
        expected = torch.cat([plain(name, model, place).eval()(x) for place, x in enumerate(betas())])
        together = model(pack(betas()))
        rows = torch.randperm(9, generator=torch.Generator().manual_seed(2))
        torch.testing.assert_close(together, expected)
        torch.testing.assert_close(model(pack(betas())[rows]), expected[rows])
        torch.testing.assert_close(model(pack(betas())[6:]), expected[6:])  # only one of the subjects
    assert together.std(0).min() > 1e-4


def test_trunk_s_gradient_is_the_sum_over_subjects():
    """Without batch statistics. Each subject's rows move its own input layer and the trunk, and no other's."""
    model = shared("mlp").double()
    model(pack(betas()).double()).square().sum().backward()
    sums = {}
    for place, x in enumerate(betas()):
        network = plain("mlp", model, place).double()
        network(x.double()).square().sum().backward()
        for name, parameter in network.named_parameters():
            key = f"inputs.{place}.{name[9:]}" if name.startswith("layers.0.") else f"common.{name}"
            sums[key] = sums.get(key, 0) + parameter.grad
    assert sums.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, sums[name])


@pytest.mark.parametrize("name", REGRESSORS)
def test_a_trunk_for_a_new_subject(name):
    source = plain(name, shared(name), 1)
    torch.manual_seed(5)
    fresh = REGRESSORS[name](13, N_TARGETS, **SIZES)
    before = {key: value.clone() for key, value in fresh.state_dict().items()}
    state = with_trunk(fresh, source.state_dict()).state_dict()
    for key, value in state.items():
        own = key.startswith(f"{fresh.INPUT}.")
        assert torch.equal(value, before[key] if own else source.state_dict()[key])
        assert is_trunk(fresh, key) != own
    moved = with_trunk(shared(name), source.state_dict())
    assert sum(not is_trunk(moved, key) for key, _ in moved.named_parameters()) == 3 * sum(
        not is_trunk(fresh, key) for key, _ in fresh.named_parameters()
    )
    with pytest.raises(RuntimeError, match="size mismatch"):
        with_trunk(REGRESSORS[name](13, N_TARGETS + 1, **SIZES), source.state_dict())


def test_errors():
    with pytest.raises(ValueError, match="1 subject; one model for all wants at least two"):
        SharedRegressor(REGRESSORS["mlp"], [4], 2)
    with pytest.raises(ValueError, match=r"shape \(2, 9\), this network of 3 subjects wants \(n_samples, 11 \+ 1\)"):
        shared("mlp")(torch.zeros(2, 9))
