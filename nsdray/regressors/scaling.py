"""Means and standard deviations, and what is done with them. NumPy; nothing here chooses whose moments are used.

What is fitted to training samples must come from training samples only: the z-score of the betas, the moments of the
latents, and the moments of the predictions that `rescale` replaces. For the last, ``rescale="train_moments"`` takes
predictions of images that the model was not fitted to (leave-one-out for ridge, the validation images for networks), so
that one new image can be decoded alone; ``"test_moments"`` takes the test predictions themselves, as Brain-Diffuser
does, and is for parity with it only.
"""
from __future__ import annotations

from collections.abc import Iterable

import numpy as np

N_VALUES_BATCH = 2**22
"""Values that `Moments` works on at a time, in three float64 copies (100 MB)."""


class Moments:
    """Running mean and standard deviation over the rows of a stream, in float64.

    Chan, Golub, LeVeque 1983: two parts (n, mean, M2), M2 the sum of squared deviations, make one with
    M2 = M2_a + M2_b + delta^2 n_a n_b / n. The order of the parts matters to rounding only.
    """

    def __init__(self) -> None:
        self.n_samples = 0
        self._mean = self._m2 = np.float64(0)

    def add(self, batch: np.ndarray) -> Moments:
        """Take in a batch (n, n_columns) of any float or integer type."""
        batch = np.asarray(batch)
        if batch.ndim != 2 or (self.n_samples and batch.shape[1:] != self._mean.shape):
            raise ValueError(f"moments: batch has shape {batch.shape}, expected (n, {self._mean.size or 'n_columns'})")
        n_rows = max(1, N_VALUES_BATCH // max(1, batch.shape[1]))
        for part in (batch[start : start + n_rows] for start in range(0, len(batch), n_rows)):
            first = part[0].astype(np.float64)
            shifted = part - first  # a constant column is exactly zero from here on
            mean = shifted.mean(0)
            self._combine(len(part), first + mean, ((shifted - mean) ** 2).sum(0))
        return self

    def merge(self, other: Moments) -> Moments:
        """Take in what another has seen."""
        if other.n_samples:
            self._combine(other.n_samples, other._mean, other._m2)
        return self

    def _combine(self, n: int, mean: np.ndarray, m2: np.ndarray) -> None:
        total = self.n_samples + n
        delta = mean - self._mean
        self._m2 = self._m2 + m2 + delta**2 * (self.n_samples * n / total)
        self._mean = self._mean + delta * (n / total)
        self.n_samples = total

    @property
    def mean(self) -> np.ndarray:
        """Mean per column, (n_columns,) float32."""
        self._require(1)
        return self._mean.astype(np.float32)

    @property
    def std(self) -> np.ndarray:
        """Standard deviation per column, ddof 1, (n_columns,) float32."""
        return self.std_of(1)

    def std_of(self, ddof: int) -> np.ndarray:
        """The same with a divisor of n_samples - ddof."""
        self._require(2)
        return np.sqrt(self._m2 / (self.n_samples - ddof)).astype(np.float32)

    def _require(self, n: int) -> None:
        if self.n_samples < n:
            raise ValueError(f"moments of {self.n_samples} samples; at least {n} are needed")


def moments(x: np.ndarray | Iterable[np.ndarray], ddof: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation over the rows of x (n_samples, n_columns), each (n_columns,) float32.

    x may be an iterable of such arrays. Accumulated in float64, N_VALUES_BATCH values at a time.
    """
    running = Moments()
    for part in [x] if hasattr(x, "ndim") else x:
        running.add(part)
    return running.mean, running.std_of(ddof)


def zscore(x: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """(x - mean) / std, (n_samples, n_columns) float32; 0 where std is 0, so that dead voxels do no harm."""
    alive = np.asarray(std) > 0
    inverse = np.divide(1, std, out=np.zeros(alive.shape, np.float32), where=alive)
    return ((x - mean) * inverse).astype(np.float32, copy=False)


def rescale(
    predictions: np.ndarray, from_mean: np.ndarray, from_std: np.ndarray, to_mean: np.ndarray, to_std: np.ndarray
) -> np.ndarray:
    """Give predictions (n_samples, n_targets) the spread of real targets: to_mean + to_std (x - from_mean) / from_std.

    A regression shrinks its predictions towards the mean, and a generator wants latents of the usual spread.
    from_*: moments of the predictions (see this module's head for whose); to_*: moments of the training targets; all
    (n_targets,). Row by row, so an image's result does not depend on the others'. A target whose predictions never vary
    (from_std 0) becomes to_mean. Returns float32.
    """
    return (to_mean + to_std * zscore(predictions, from_mean, from_std)).astype(np.float32, copy=False)
