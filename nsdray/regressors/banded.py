"""Ridge regression whose voxels are penalised by group (banded ridge; Nunez-Elizalde, Huth, Gallant 2019).

Group g's penalty is alpha k_g. The kernel is then the sum of the groups' kernels, each divided by k_g, which is what
`nsdray.regressors.ridge` computes from factors per voxel; nothing else changes. Factors are given, or drawn and compared.
"""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nsdray.seeds import rng


def voxel_penalties(groups: Sequence[np.ndarray], factors: Sequence[float], n_voxels: int) -> np.ndarray:
    """Factors on alpha per voxel, (n_voxels,) float64, from one per group. groups: voxel indices (disjoint)."""
    if len(groups) != len(factors):
        raise ValueError(f"{len(factors)} penalties for {len(groups)} groups of voxels; give one for each")
    penalties = np.ones(n_voxels)
    for voxels, factor in zip(groups, factors):
        penalties[voxels] = factor
    return penalties


def drawn_penalties(n_groups: int, n_draws: int, *key: int | str) -> list[tuple[float, ...]]:
    """Random factors on alpha, a tuple of n_groups each: inverses of kernel weights that are uniform over all that are
    positive with mean 1 (Dirichlet; Dupré la Tour et al. 2022 search so). key: the seed, and what it is for."""
    weights = rng(*key, "penalties").dirichlet(np.ones(n_groups), n_draws) * n_groups
    return [tuple(float(1 / max(w, 1e-3)) for w in draw) for draw in weights]
