"""One network for several subjects, whose voxels differ: an input layer for each below a common trunk.

A subject's part, its input layer and the trunk, is a plain network of the same class, so it decodes alone; and a trunk can
be given to a subject that it has never seen (`with_trunk`), whose input layer is then all that is left to learn.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn


def pack(betas: Sequence[torch.Tensor]) -> torch.Tensor:
    """Z-scored betas of several subjects (n_i, n_voxels_i) as the rows of one tensor (sum of n_i, most voxels + 1) float32:
    filled up with zeros, and the subject's place in the sequence in the last column."""
    width = max(x.shape[1] for x in betas)
    rows = torch.zeros(sum(len(x) for x in betas), width + 1)
    start = 0
    for place, x in enumerate(betas):
        rows[start : start + len(x), : x.shape[1]] = x
        rows[start : start + len(x), -1] = place
        start += len(x)
    return rows


class SharedRegressor(nn.Module):
    """`pack`ed betas (n_samples, most voxels + 1) to standardised targets (n_samples, n_targets), both float32.

    network: a class in `nsdray.regressors.REGRESSORS`. n_voxels: one number per subject. sizes: the network's own arguments.
    Batch statistics are those of all subjects together, so every batch should hold its share of each.
    """

    def __init__(self, network: type[nn.Module], n_voxels: Sequence[int], n_targets: int, **sizes: float):
        super().__init__()
        if len(n_voxels) < 2:
            raise ValueError(f"SharedRegressor: {len(n_voxels)} subject; one model for all wants at least two")
        self.n_voxels = tuple(n_voxels)
        self.inputs = nn.ModuleList()
        for n in n_voxels:
            self.common = network(n, n_targets, **sizes)
            self.inputs.append(self.common.get_submodule(network.INPUT))
        parent, _, name = network.INPUT.rpartition(".")
        setattr(self.common.get_submodule(parent), name, nn.Identity())

    def forward(self, betas: torch.Tensor) -> torch.Tensor:
        if betas.ndim != 2 or betas.shape[1] != max(self.n_voxels) + 1:
            raise ValueError(
                f"betas have shape {tuple(betas.shape)}, this network of {len(self.inputs)} subjects wants "
                f"(n_samples, {max(self.n_voxels)} + 1), as pack makes them"
            )
        subject = betas[:, -1].long()
        order = torch.argsort(subject, stable=True)
        counts = torch.bincount(subject, minlength=len(self.inputs)).tolist()
        read = [
            self.common.read(layer, rows[:, :n])
            for layer, n, rows in zip(self.inputs, self.n_voxels, betas[order].split(counts))
            if len(rows)
        ]
        return self.common.trunk(torch.cat(read)[torch.argsort(order)])


def subject_state(state: Mapping[str, torch.Tensor], place: int, layer: str) -> dict[str, torch.Tensor]:
    """State of one subject's plain network from a `SharedRegressor`'s. layer: the network's INPUT."""
    own, common = f"inputs.{place}.", "common."
    found = {f"{layer}.{name.removeprefix(own)}": value for name, value in state.items() if name.startswith(own)}
    return found | {name.removeprefix(common): value for name, value in state.items() if name.startswith(common)}


def with_trunk(network: nn.Module, state: Mapping[str, torch.Tensor]) -> nn.Module:
    """Give a network, plain or shared, the trunk of a plain network's state; input layers stay as they are."""
    plain = getattr(network, "common", network)
    trunk = {name: value for name, value in state.items() if not name.startswith(f"{plain.INPUT}.")}
    own = {name: value for name, value in plain.state_dict().items() if name.startswith(f"{plain.INPUT}.")}
    plain.load_state_dict(own | trunk)
    return network


def is_trunk(network: nn.Module, name: str) -> bool:
    """Whether a parameter of a network, plain or shared, lies above the input layers."""
    return name.startswith("common.") if isinstance(network, SharedRegressor) else not name.startswith(f"{network.INPUT}.")
