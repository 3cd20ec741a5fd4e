"""Identification: is the decoded image's representation closer to its own image than to other images?

Both scores compare every prediction with every image but keep little: correlations are computed block by block in float32,
and only those that float32 cannot tell from the prediction's own are computed again in float64. So the answer is exact, ties
included, at the cost of a float32 matrix product.
"""
from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from scipy.special import gammaln

from nsdray.seeds import rng

N_FEATURES_BATCH = 1024  # terms that one float32 matrix product adds up: bounds its rounding, and the memory
N_PAIRS_BATCH = 1024
ROUNDING = 2.0**-24  # of float32
TIE = 1e-12  # what float64 rounding leaves, at most, of the difference of two equal correlations
MANY = 0.01  # share of doubtful pairs from which one float64 matrix product is cheaper than so many single pairs


class Rows(NamedTuple):
    """Row vectors (n, n_features), and what makes them unit vectors: (values - mean) * scale, with float64 (n,) each."""

    values: np.ndarray
    mean: np.ndarray
    scale: np.ndarray

    def unit(self, rows: slice | np.ndarray, columns: slice, dtype: type) -> np.ndarray:
        """Some columns of some of the unit vectors, computed in float64, then rounded to dtype."""
        part = self.values[rows, columns] - self.mean[rows, None]
        return np.multiply(part, self.scale[rows, None], out=part if dtype is np.float64 else np.empty(part.shape, dtype))


def _columns(n_features: int) -> list[slice]:
    return [slice(start, start + N_FEATURES_BATCH) for start in range(0, n_features, N_FEATURES_BATCH)]


def checked_pair(truth: np.ndarray, prediction: np.ndarray, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Both as arrays (n, n_features) of the same shape, n >= 1; ValueError otherwise. what: the caller's name."""
    truth, prediction = np.asarray(truth), np.asarray(prediction)
    if truth.ndim != 2 or truth.shape != prediction.shape or not truth.size:
        raise ValueError(
            f"{what}: truth has shape {truth.shape} and prediction {prediction.shape}; both must be (n_images, n_features), "
            "the same images in the same order. Flatten each image's features to one row."
        )
    return truth, prediction


def centred(values: np.ndarray, what: str) -> tuple[Rows, np.ndarray]:
    """Rows whose products are Pearson correlations, and which rows are constant, (n,) bool (scaled by 0, so that
    they correlate 0 with everything). ValueError if a value is not finite."""
    with np.errstate(invalid="ignore"):
        mean = values.mean(1, dtype=np.float64)
    _refuse(~np.isfinite(mean), what, "hold values that are not finite", "Look for overflow (half precision?) upstream.")
    squares = np.zeros(len(values))
    for columns in _columns(values.shape[1]):
        part = values[:, columns] - mean[:, None]
        squares += np.einsum("ij,ij->i", part, part)
    constant = values.max(1) == values.min(1)  # exact, where the sum of squares has rounding
    return Rows(values, mean, np.where(constant, 0, 1 / np.sqrt(np.where(constant, 1, squares)))), constant


def refuse_constant(constant: np.ndarray, what: str) -> None:
    """ValueError that names the truth's constant rows."""
    _refuse(constant, what, "are constant and correlate with nothing", "Look at these pictures; leave them out of both arrays.")


def _refuse(bad: np.ndarray, what: str, why: str, remedy: str) -> None:
    rows = np.flatnonzero(bad)
    if len(rows):
        raise ValueError(f"{what}: {len(rows)} of {len(bad)} rows {why}, first {rows[:5].tolist()}. {remedy}")


def two_way(truth: np.ndarray, prediction: np.ndarray, n_rows_batch: int = 1024) -> np.ndarray:
    """Two-way identification: the share of the other images that each prediction is told from, (n,) float64 in [0, 1].

        score[j] = 1 / (n - 1) * #{i != j : r(truth[i], prediction[j]) < r(truth[j], prediction[j])},   r: Pearson

    Higher is better; chance is 0.5; the mean over images is the published figure. The inequality is strict, so a tie is a
    failure, and distractors are true images for one prediction (columns of r), as in Brain-Diffuser's and MindEye's scripts;
    Takagi & Nishimoto's runs over predictions.

    Args:
        truth, prediction: features of shape (n_images, n_features), any real dtype, n_images >= 2, row for row the same image.
        n_rows_batch: images in a block. Memory beyond the input is some 50 bytes x n_rows_batch x max(n_rows_batch, 1024),
            and 8 KB an image, whatever n_features; the n x n matrix never exists.

    Correlations nearer to each other than 1e-12 are tied: that is what rounding makes of equal ones (in the references, it is
    rounding that decides them). A constant prediction correlates with nothing, all its comparisons are ties, and it scores 0,
    as the references' NaN makes it; a constant true row is refused, since the references would let it beat everyone silently.
    """
    truth, prediction = checked_pair(truth, prediction, "two-way identification")
    n = len(truth)
    if n < 2:
        raise ValueError(f"two-way identification: {n} image; it needs at least 2")
    images, constant = centred(truth, "two-way identification, truth")
    refuse_constant(constant, "two-way identification, truth")
    predictions, _ = centred(prediction, "two-way identification, prediction")
    beaten = np.zeros(n, np.int64)
    for _, columns, success in comparisons(images, predictions, n_rows_batch):
        beaten[columns] += success.sum(0)
    return beaten / (n - 1)


def retrieval(
    brain_tokens: np.ndarray, image_tokens: np.ndarray, n_pool: int = 300, n_draws: int | None = 30, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Top-1 retrieval among a pool of images by cosine similarity: (forward, backward), (n,) float64 in [0, 1] each.

    forward[i]: given the brain's tokens of image i, its image is the nearest of the pool (brain to image). backward[i]: given
    the image, its brain is the nearest (image to brain). Each is a mean over the draws of n_pool images without replacement
    that image i was in; NaN if in none (at 30 draws of 300 out of 982, 1 test set in 50 has such an image). Higher is
    better; chance is 1 / n_pool. A tie is a failure.

    Args:
        brain_tokens, image_tokens: (n_images, ...), flattened and scaled to unit length here; row for row the same image.
        n_draws: None: the expectation over all pools, in closed form, with no NaN and no seed: what 30 draws estimate.

    MindEye (Scotti et al. 2023), whose protocol this is: its script's similarity function returns the transposed matrix, so
    what it prints as forward ranks brains for an image, and is our backward.
    """
    brain, image = (np.asarray(tokens) for tokens in (brain_tokens, image_tokens))
    brain, image = (tokens.reshape(len(tokens), -1) if tokens.ndim > 1 else tokens for tokens in (brain, image))
    image, brain = checked_pair(image, brain, "retrieval")
    n = len(image)
    if not 2 <= n_pool <= n:
        raise ValueError(f"retrieval: pools of {n_pool} out of {n} images; n_pool must lie between 2 and the number of images")
    if n_draws is not None and n_draws < 1:
        raise ValueError(f"retrieval: n_draws is {n_draws}; give at least 1, or None for the expectation over all pools")
    images, brains = _unit_length(image, "retrieval, image_tokens"), _unit_length(brain, "retrieval, brain_tokens")
    forward, backward = _all_beaten(images, brains), _all_beaten(brains, images)
    if n_draws is None:
        return _expected_top1(forward, n_pool), _expected_top1(backward, n_pool)
    generator = rng(seed, "retrieval", n, n_pool)
    pools = [generator.permutation(n)[:n_pool] for _ in range(n_draws)]
    return _drawn_top1(forward, pools), _drawn_top1(backward, pools)


def _unit_length(values: np.ndarray, what: str) -> Rows:
    squares = np.zeros(len(values))
    for columns in _columns(values.shape[1]):
        part = values[:, columns].astype(np.float64)
        squares += np.einsum("ij,ij->i", part, part)
    _refuse(~np.isfinite(squares), what, "hold values that are not finite", "Look for overflow (half precision?) upstream.")
    _refuse(squares == 0, what, "are zero and have no direction", "Look at these images; leave them out of both arrays.")
    return Rows(values, np.zeros(len(values)), 1 / np.sqrt(squares))


def _all_beaten(candidates: Rows, queries: Rows) -> np.ndarray:
    """(n, n) bool: candidate i is farther from query j than candidate j is; true on the diagonal."""
    beaten = np.eye(len(queries.values), dtype=bool)
    for rows, columns, success in comparisons(candidates, queries):
        beaten[rows, columns] |= success
    return beaten


def _drawn_top1(beaten: np.ndarray, pools: list[np.ndarray]) -> np.ndarray:
    hits, drawn = np.zeros(len(beaten)), np.zeros(len(beaten))
    for pool in pools:
        hits[pool] += beaten[np.ix_(pool, pool)].all(0)
        drawn[pool] += 1
    return np.divide(hits, drawn, out=np.full(len(beaten), np.nan), where=drawn > 0)


def _expected_top1(beaten: np.ndarray, n_pool: int) -> np.ndarray:
    """Of the n - 1 others, k are not beaten; none of them is among n_pool - 1 drawn: C(n-1-k, n_pool-1) / C(n-1, n_pool-1)."""
    n = len(beaten)
    k = n - beaten.sum(0)  # the diagonal counts as beaten
    # log-gamma is infinite at 0 and at negative integers, so that the impossible has probability 0
    return np.exp(gammaln(n - k) - gammaln(n - k - n_pool + 1) - gammaln(n) + gammaln(n - n_pool + 1))


def comparisons(
    candidates: Rows, queries: Rows, n_rows_batch: int = 1024
) -> Iterator[tuple[slice, slice, np.ndarray]]:
    """Yield (rows, columns, success) blocks; success[i, j]: candidate i is strictly less like query j than candidate j is."""
    if n_rows_batch < 1:
        raise ValueError(f"n_rows_batch is {n_rows_batch}; give at least 1 image a block")
    n = len(queries.values)
    own = _pair_products(candidates, queries, np.arange(n), np.arange(n))
    batches = [slice(start, min(start + n_rows_batch, n)) for start in range(0, n, n_rows_batch)]
    for columns in batches:
        for rows in batches:
            yield rows, columns, _less_than_own(candidates, queries, rows, columns, own[columns])


def _less_than_own(candidates: Rows, queries: Rows, rows: slice, columns: slice, own: np.ndarray) -> np.ndarray:
    """One block of comparisons. Sums of K products of the entries of unit vectors, in float32 and any order, are wrong by
    K * 2^-24 at most (Cauchy-Schwarz; Higham 2002, section 3.1): what differs from own by more is decided."""
    n_features = queries.values.shape[1]
    n_terms = min(n_features, N_FEATURES_BATCH) + len(_columns(n_features)) + 8  # a product's, their sum's, the inputs' rounding
    doubt = 1.01 * n_terms * ROUNDING
    product = _product(candidates, queries, rows, columns, np.float32)
    success = product < own - doubt
    unsure = (product <= own + doubt) & ~success
    unsure &= np.arange(rows.start, rows.stop)[:, None] != np.arange(columns.start, columns.stop)
    i, j = np.nonzero(unsure)
    if len(i) > MANY * unsure.size:
        success = _product(candidates, queries, rows, columns, np.float64) < own - TIE
    else:
        success[i, j] = _pair_products(candidates, queries, rows.start + i, columns.start + j) < own[j] - TIE
    return success


def _product(candidates: Rows, queries: Rows, rows: slice, columns: slice, dtype: type) -> np.ndarray:
    """(n_rows, n_columns) inner products of unit vectors, a batch of features at a time."""
    total = np.zeros((rows.stop - rows.start, columns.stop - columns.start), dtype)
    for features in _columns(queries.values.shape[1]):
        total += candidates.unit(rows, features, dtype) @ queries.unit(columns, features, dtype).T
    return total


def _pair_products(candidates: Rows, queries: Rows, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Inner products of candidate rows[k] and query columns[k], (len(rows),) float64."""
    total = np.zeros(len(rows))
    for start in range(0, len(rows), N_PAIRS_BATCH):
        pairs = slice(start, start + N_PAIRS_BATCH)
        for features in _columns(queries.values.shape[1]):
            left = candidates.unit(rows[pairs], features, np.float64)
            total[pairs] += np.einsum("ij,ij->i", left, queries.unit(columns[pairs], features, np.float64))
    return total
