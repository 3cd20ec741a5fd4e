"""Per-image scores and the table that people read.

Every score comes with its chance level (the same pictures, paired wrongly) and, for pictures, its ceiling (the VDVAE given
the true latents).
"""
from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator

import numpy as np

from nsdray.metrics.identification import retrieval
from nsdray.metrics.perceptual import Metric, compare, pixel_scores
from nsdray.seeds import rng

LATENT_METRICS = ("latent_mse", "latent_mae")
RETRIEVAL_METRICS = ("forward", "backward")
N_POOL = 300  # test images to retrieve among, as MindEye; fewer if there are fewer
N_IMAGES_BATCH = 32
Score = tuple[str, str, np.ndarray]
"""(metric, pairing, values (n,) float64), pairing one of "matched", "chance", "ceiling"."""
Reader = Callable[[np.ndarray], np.ndarray]
"""Gives the pictures of some rows of a test set, uint8 (n_rows, h, w, 3), so that those of all need not be in memory."""


def wrong_pairings(n: int, seed: int = 0, n_pairings: int = 5) -> list[np.ndarray]:
    """Derangements of n images: index arrays (n,) that pair no image with itself. Needs n >= 2."""
    if n < 2:
        raise ValueError(f"chance level: {n} test image; wrong pairs need at least 2")
    shifts = rng(seed, "wrong pairs", n).permutation(np.arange(1, n))[:n_pairings]
    return [(np.arange(n) + shift) % n for shift in shifts]


def latent_scores(truth: np.ndarray, prediction: np.ndarray) -> Iterator[Score]:
    """MSE and MAE over the latents of each image, (n, n_targets) pairs on the raw latents' scale. Lower is better; 0 is
    perfect. Chance: the latents of other images."""
    truth, prediction = truth.astype(np.float32), prediction.astype(np.float32)
    for name, error in zip(LATENT_METRICS, (np.square, np.abs)):
        yield name, "matched", error(prediction - truth).mean(1, dtype=np.float64)
        wrong = [error(prediction - truth[other]).mean(1, dtype=np.float64) for other in wrong_pairings(len(truth))]
        yield name, "chance", np.mean(wrong, 0)


def retrieval_scores(truth: np.ndarray, prediction: np.ndarray) -> Iterator[Score]:
    """Top-1 retrieval by the predicted tokens (n, n_tokens, d) among N_POOL test images, all if there are fewer: "forward" from
    brain to image, "backward" from image to brain (`nsdray.metrics.identification.retrieval`, the expectation over all
    pools). Higher is better; chance is 1 / the pool's size."""
    n_pool = min(N_POOL, len(truth))
    for name, values in zip(RETRIEVAL_METRICS, retrieval(prediction, truth, n_pool, n_draws=None)):
        yield name, "matched", values
        yield name, "chance", np.full(len(truth), 1 / n_pool)


def picture_scores(suite: str, n: int, seen: Reader, pictures: Reader, ceiling: Reader | None = None) -> Iterator[Score]:
    """A suite's pixel metrics of a test set of n images: as seen, as decoded, and as the models give them from the truth (None:
    there are no such). Decoded pictures come at the size that they were made in: how they are resized is the suite's affair.

    Chance: the decoded pictures against other images, over at most 5 wrong pairings (fewer for large test sets, where one
    is precise enough).
    """
    wrong = wrong_pairings(n, n_pairings=max(1, min(5, 300 // n)))
    found: dict[tuple[str, str], list[np.ndarray]] = defaultdict(list)
    for rows in np.array_split(np.arange(n), -(-n // N_IMAGES_BATCH)):
        decoded = pictures(rows)
        pairs = [("matched", seen(rows), decoded)] + [("chance", seen(other[rows]), decoded) for other in wrong]
        if ceiling is not None:
            pairs.append(("ceiling", pairs[0][1], ceiling(rows)))
        scores = defaultdict(list)
        for pairing, truth, own in pairs:
            for name, values in pixel_scores(suite, truth, own):
                scores[name, pairing].append(values)
        for key, values in scores.items():
            found[key].append(np.mean(values, 0))
    for (name, pairing), values in found.items():
        yield name, pairing, np.concatenate(values)


def feature_scores(
    metric: Metric, seen: np.ndarray, pictures: np.ndarray, ceiling: np.ndarray | None = None
) -> Iterator[Score]:
    """A metric of features (n, n_features): as seen, as decoded, and of the ceiling's pictures, if any. Chance: wrong pairs."""
    yield metric.name, "matched", compare(metric, seen, pictures)
    pairings = wrong_pairings(len(seen), n_pairings=max(1, min(5, 300 // len(seen))))
    yield metric.name, "chance", np.mean([compare(metric, seen[other], pictures) for other in pairings], 0)
    if ceiling is not None:
        yield metric.name, "ceiling", compare(metric, seen, ceiling)


def format_table(rows: list[dict[str, object]]) -> str:
    """A text table from dicts with the same keys; floats get three decimals (latent errors four: models differ by less than a
    thousandth), None a dash.

    What stands before a "/" in neighbouring keys goes to a line above them, once.
    """

    def cell(key: str, value: object) -> str:
        if value is None:
            return "-"
        return f"{value:.{4 if key.startswith('latents/') else 3}f}" if isinstance(value, float) else str(value)

    cells = [[cell(key, value) for key, value in row.items()] for row in rows]
    groups = [key.rpartition("/")[0] for key in rows[0]]
    header = [key.rpartition("/")[2] for key in rows[0]]
    above = [group if i == 0 or group != groups[i - 1] else "" for i, group in enumerate(groups)]
    widths = [max(len(line[i]) for line in [header, above, *cells]) for i in range(len(header))]
    lines = ["  ".join(c.rjust(w) for c, w in zip(line, widths)) for line in [header, *cells]]
    lines.insert(1, "  ".join("-" * w for w in widths))
    if any(above):
        lines.insert(0, "  ".join(c.ljust(w) for c, w in zip(above, widths)).rstrip())
    return "\n".join(lines)
