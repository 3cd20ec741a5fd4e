"""How well betas repeat across runs: the error by which hyperparameters are chosen.

Each run is left out in turn. The unregularised beta of every trial in it is compared with the betas, under the
hyperparameter in question, of all trials of the same condition in the other runs:

    error = sum over pairs (i, j) of one condition in different runs of (z_j - z0_i)^2

z are betas that were standardised, session by session, with the moments of the unregularised betas z0. Summed over all
runs left out, the pairs form a symmetric matrix A, so the error is sum_j d_j z_j^2 - 2 z' A z0 + sum_i d_i z0_i^2 with
d = A 1: no loop over trials.
"""
from __future__ import annotations

import numpy as np
from scipy import sparse

from nsdray.glm.design import Design


def repeat_pairs(design: Design) -> sparse.csr_array:
    """A: float32 (n_trials, n_trials), 1 where two trials are of one condition but in different runs."""
    cell = np.unique(np.stack([design.condition, design.run]), axis=1, return_inverse=True)[1]
    of_condition, of_cell = _indicator(design.condition), _indicator(cell)
    pairs = (of_condition @ of_condition.T - of_cell @ of_cell.T).tocsr()
    pairs.eliminate_zeros()
    return pairs


def _indicator(group: np.ndarray) -> sparse.csr_array:
    """float32 (n_trials, n_groups), 1 at a trial's group."""
    return sparse.csr_array((np.ones(len(group), np.float32), (np.arange(len(group)), group)))


class RepeatError:
    """The error above as a function of betas, for fixed unregularised ones."""

    def __init__(self, betas: np.ndarray, design: Design, pairs: sparse.csr_array) -> None:
        """betas: unregularised, (n_voxels, n_trials) float32. pairs: from `repeat_pairs`."""
        session = np.unique(design.session, return_inverse=True)[1][design.run]
        groups = [betas[:, session == one] for one in range(session.max() + 1)]
        sd = np.stack([one.std(axis=1, ddof=min(1, one.shape[1] - 1)) for one in groups], axis=1)
        inverse_sd = np.divide(1, sd, where=sd > 0, out=np.zeros_like(sd))
        column = session if len(groups) > 1 else slice(None)  # of one session, a single column is enough
        self._mean = np.stack([one.mean(axis=1) for one in groups], axis=1)[:, column]
        self._inverse_sd = inverse_sd[:, column]
        z = self._standardise(betas)
        self._n_pairs = pairs.sum(axis=1).astype(np.float32)
        self._twice_target = np.ascontiguousarray(2 * (pairs @ z.T).T)
        self._constant = (z**2) @ self._n_pairs

    def __call__(self, betas: np.ndarray) -> np.ndarray:
        """Error of betas (n_voxels, n_trials): (n_voxels,) float32, sum of squares in units of standard deviations."""
        z = self._standardise(betas)
        return self._constant + np.einsum("vt,vt->v", z * self._n_pairs - self._twice_target, z)

    def _standardise(self, betas: np.ndarray) -> np.ndarray:
        return (betas - self._mean) * self._inverse_sd
