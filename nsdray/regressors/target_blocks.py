"""A block of targets, made ready for the products of a closed-form regression: converted, less its mean."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nsdray.regressors.linalg import Array, Scratch, copy_into, empty, to_device, to_numpy

N_ROWS_CHUNK, N_ROWS_CHUNK_GPU = 64, 4096
"""Rows of targets that are converted at a time: on a CPU they stay in the cache, on a GPU each time waits for it."""


@dataclass(frozen=True)
class TargetBlock:
    """Some targets of all training samples."""

    centred: Array
    """(n_samples, n_targets) less the mean, on the device."""
    mean: np.ndarray
    """(n_targets,) float64."""
    std: np.ndarray
    """(n_targets,) float64, ddof 1."""


def centre_targets(
    targets: np.ndarray, dtype: type, device: str | None = None, n_samples: int | None = None, scratch: Scratch | None = None
) -> TargetBlock:
    """Convert targets (n_samples, n_targets) of any precision and take off their mean. n_samples: how many there must be.
    scratch: where to, on a CPU."""
    targets = np.asarray(targets)
    if targets.ndim != 2 or (n_samples is not None and len(targets) != n_samples):
        raise ValueError(
            f"targets have shape {targets.shape}, expected ({n_samples or 'n_samples'}, n_targets): one row per sample"
        )
    in_scratch = scratch is not None and device is None
    centred = scratch.empty(targets.shape, dtype) if in_scratch else empty(targets.shape, dtype, device)
    n, first = len(targets), None
    total, squares = np.zeros((2, targets.shape[1]))
    rows = N_ROWS_CHUNK if device is None else N_ROWS_CHUNK_GPU
    for start in range(0, n, rows):
        part = centred[start : start + rows]
        copy_into(part, targets[start : start + rows])
        if first is None:  # near enough to the mean, and exact where a target is constant
            first = part[0] + 0
        part -= first
        total += to_numpy(part.sum(0))
        squares += to_numpy((part * part).sum(0))
    refuse_not_finite(total, "targets")
    centred -= to_device((total / n).astype(dtype), device)
    variance = np.maximum(squares - total**2 / n, 0) / max(1, n - 1)
    return TargetBlock(centred, to_numpy(first).astype(np.float64) + total / n, np.sqrt(variance))


def refuse_not_finite(sums: np.ndarray, name: str) -> None:
    """ValueError if the sums or means of columns show values that are not finite."""
    bad = np.flatnonzero(~np.isfinite(sums))
    if len(bad):
        raise ValueError(
            f"ridge: {name} hold NaN or infinity in {len(bad)} of {len(sums)} columns (first: {bad[0]}); "
            "mask those voxels or samples before"
        )
