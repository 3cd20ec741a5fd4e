"""What is worth its cost."""
from __future__ import annotations

import numpy as np


def pareto_front(cost: np.ndarray, quality: np.ndarray) -> np.ndarray:
    """Which of n choices are not beaten: no other is at least as good for at most the cost, and better in one of the two.

    cost, quality: (n,), lower cost and higher quality are better; a choice that is not finite is on no front. Returns (n,)
    bool; of equal choices all are kept.
    """
    cost, quality = np.asarray(cost, np.float64), np.asarray(quality, np.float64)
    if cost.shape != quality.shape or cost.ndim != 1:
        raise ValueError(f"pareto_front: cost has shape {cost.shape}, quality {quality.shape}; both must be (n,)")
    valid = np.isfinite(cost) & np.isfinite(quality)
    cheaper, better = cost[:, None] <= cost, quality[:, None] >= quality  # [i, j]: i against j
    strictly = (cost[:, None] < cost) | (quality[:, None] > quality)
    return valid & ~(valid[:, None] & cheaper & better & strictly).any(0)
