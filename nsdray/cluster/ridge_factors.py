"""What is done once for a subject's ridges: betas, kernel, factors, and the choice of alphas and penalties.

Shared alphas and penalties of voxel groups are chosen on a seeded sample of a kind's targets, here; an alpha per target while
its block is at hand (`nsdray.cluster.ridge`).
"""
from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from nsdray.cluster.data import read_samples, read_targets
from nsdray.nsd.rois import voxel_groups
from nsdray.regressors.banded import drawn_penalties, voxel_penalties
from nsdray.regressors.linalg import Cholesky, Eigen, find_device, to_numpy
from nsdray.regressors.ridge import RidgeKernel, ridge_kernel
from nsdray.regressors.ridge_grid import Smoothers, alpha_scores, make_smoothers
from nsdray.regressors.scaling import moments, zscore
from nsdray.regressors.target_blocks import centre_targets
from nsdray.seeds import rng
from nsdray.stages import Fit, SubjectPlan

N_TARGETS_BLOCK = 4096
"""Targets of a block that is read, at least (a VDVAE layer or a CLIP token is never cut), and of what is multiplied at once, at
most."""


def blocks_of(columns: Sequence[str], sizes: Sequence[int]) -> list[list[str]]:
    """Columns in groups of at least N_TARGETS_BLOCK targets (but for the last)."""
    blocks: list[list[str]] = [[]]
    n = 0
    for column, size in zip(columns, sizes):
        if n >= N_TARGETS_BLOCK:
            blocks.append([])
            n = 0
        blocks[-1].append(column)
        n += size
    return blocks


def pieces_of(n_targets: int) -> list[slice]:
    """A block's targets in as few pieces as can be, about as large as each other, of at most N_TARGETS_BLOCK."""
    bounds = np.linspace(0, n_targets, -(-n_targets // N_TARGETS_BLOCK) + 1).astype(int)
    return [slice(start, stop) for start, stop in zip(bounds[:-1], bounds[1:])]


def equal_shares(sizes: Sequence[int], n: int) -> list[slice]:
    """At most n runs of neighbours with about the same sum of sizes."""
    ends = np.cumsum(sizes)
    bounds = np.searchsorted(ends - np.array(sizes) / 2, ends[-1] * np.arange(n + 1) / n)  # each goes where its middle is
    return [slice(start, stop) for start, stop in zip(bounds[:-1], bounds[1:]) if stop > start]


def sizes_of(subject: SubjectPlan, fit: Fit, columns: Sequence[str]) -> list[int]:
    """Targets in each of these columns."""
    sizes = dict(zip(subject.plan.columns(fit.kind), subject.plan.shapes(fit.kind)))
    return [int(np.prod(sizes[column])) for column in columns]


@dataclass(frozen=True)
class Betas:
    """A subject's betas, z-scored by the training images' moments, and how they are sampled and grouped."""

    train: np.ndarray
    """(n_train, n_voxels) float32."""
    test: np.ndarray
    groups: dict[str, np.ndarray]
    """Voxels of each group; empty where none were asked for."""

    def kernel(self, penalties: Sequence[float], dtype: str, device: str | None) -> RidgeKernel:
        """Of the training images, with a penalty per group (empty: 1)."""
        own = voxel_penalties(list(self.groups.values()), penalties, self.train.shape[1]) if penalties else None
        return ridge_kernel(self.train, own, np.dtype(dtype), device)


@dataclass(frozen=True)
class Choice:
    """What a kind's targets are predicted with."""

    alphas: tuple[float, ...]
    """One for all targets, or several of which each target takes its own."""
    penalties: tuple[float, ...] = ()
    """Factors on alpha per voxel group; empty: 1."""


@ray.remote(num_cpus=1, num_returns=2)
def standardise(subject: SubjectPlan) -> tuple[Betas, dict[str, np.ndarray]]:
    """z-score the betas by the training images' moments. Also the moments."""
    (_, train), (_, test) = (read_samples(subject, split) for split in ("train", "test"))
    mean, std = moments(train)
    for betas in (train, test):
        for start in range(0, len(betas), 512):
            betas[start : start + 512] = zscore(betas[start : start + 512], mean, std)
    return Betas(train, test, groups_of(subject)), {"betas_mean": mean, "betas_std": std}


def groups_of(subject: SubjectPlan) -> dict[str, np.ndarray]:
    """Voxels of each group; empty where none were asked for."""
    names = subject.plan.config.ridge.groups
    return voxel_groups(subject.voxels, names) if names else {}


def sampled_rows(subject: SubjectPlan) -> np.ndarray:
    """Training images of the leave-one-out sample: seeded, about as many as there are test images."""
    n_train, n_test = (len(subject.image_ids(split)) for split in ("train", "test"))
    rows = rng(subject.plan.config.seed, "leave-one-out", subject.subject).permutation(n_train)
    return np.sort(rows[: max(2, n_test)])


@ray.remote
def make_kernel(betas: Betas, choice: Choice, dtype: str) -> RidgeKernel:
    """The kernel for a choice's penalties, without the betas, which have their own place in the object store."""
    kernel = betas.kernel(choice.penalties, dtype, find_device())
    return dataclasses.replace(kernel, betas=None, gram_=to_numpy(kernel.gram_), device=None)


@ray.remote
def decompose(kernel: RidgeKernel) -> Eigen:
    """The eigendecomposition that serves all alphas and all kinds of targets."""
    return dataclasses.replace(kernel, device=find_device()).decompose().to(None)


@ray.remote(num_returns=2)
def solve_kernel(subject: SubjectPlan, betas: Betas, kernel: RidgeKernel, eigen: Eigen | None, choice: Choice,
                 settings: dict[str, Any]) -> tuple[Smoothers, Cholesky | Eigen | None]:  # fmt: skip
    """The smoothers at the chosen alphas, and the inverse that they were made from if blocks of targets need it."""
    device = find_device()
    kernel = dataclasses.replace(kernel, betas=betas.train, device=device)
    if eigen is None:
        factors = [kernel.factorise(alpha) for alpha in choice.alphas]
        inverse = factors[0].inverse.to(None)
    else:
        own = eigen.to(device)
        factors, inverse = [kernel.at(alpha, own) for alpha in choice.alphas], eigen
    rows = None if settings["held_out"] == "all" else sampled_rows(subject)
    smoothers = make_smoothers(factors, betas.test, rows, list(betas.groups.values()) or None)
    return smoothers.to(None), inverse if settings["weights"] or scored_apart(settings, choice) else None


def scored_apart(settings: dict[str, Any], choice: Choice) -> bool:
    """Whether targets choose among alphas by other leave-one-out predictions than those that train_moments needs anyway."""
    return len(choice.alphas) > 1 and (settings["selection"] != "sample" or settings["held_out"] == "all")


# Choosing alphas and penalties.


@ray.remote(num_cpus=1)
def sample_targets(subject: SubjectPlan, fit: Fit, n_targets: int) -> np.ndarray:
    """A seeded sample of a kind's targets, float16 (n_train, n_targets)."""
    columns = subject.plan.columns(fit.kind)
    sizes = sizes_of(subject, fit, columns)
    ends = np.cumsum(sizes)
    chosen = np.sort(rng(subject.plan.config.seed, "ridge targets", fit.kind).permutation(ends[-1])[:n_targets])
    parts = []
    for block in blocks_of(columns, sizes):
        first = columns.index(block[0])
        start, end = ends[first] - sizes[first], ends[first + len(block) - 1]
        own = chosen[(chosen >= start) & (chosen < end)] - start
        if len(own):
            parts.append(read_targets(subject, "train", block, fit.kind)[:, own])
    return np.concatenate(parts, 1)


@ray.remote
def score_penalties(subject: SubjectPlan, betas: Betas, kernel: RidgeKernel | None, eigen: Eigen | None,
                    penalties: tuple[float, ...], settings: list[dict[str, Any]], *targets: np.ndarray
                    ) -> list[np.ndarray]:  # fmt: skip
    """Leave-one-out R2 at each alpha, (n_alphas, n_targets), of some targets of each kind. kernel, eigen: None makes those of the
    penalties."""
    device = find_device()
    if kernel is None:
        kernel = betas.kernel(penalties, settings[0]["dtype"], device)
    kernel = dataclasses.replace(kernel, device=device)
    eigen, rows, scores = kernel.decompose() if eigen is None else eigen.to(device), sampled_rows(subject), []
    for own, some in zip(settings, targets):
        block = centre_targets(some, kernel.dtype, device)
        scores.append(alpha_scores(kernel, eigen, own["alphas"], block, own["selection"], rows))
    return scores


@ray.remote(num_cpus=1)
def choose(settings: dict[str, Any], candidates: list[tuple[float, ...]], kind: int, *scores: list[np.ndarray]) -> Choice:
    """The penalties and the alpha with the best mean R2; with an alpha per target, the penalties whose best alphas have it.
    scores: of each candidate, a list over kinds."""
    own = [some[kind] for some in scores]
    if settings["per_target"]:
        return Choice(tuple(settings["alphas"]), candidates[int(np.argmax([some.max(0).mean() for some in own]))])
    best, alpha = np.unravel_index(np.argmax([some.mean(1) for some in own]), (len(candidates), len(settings["alphas"])))
    return Choice((settings["alphas"][alpha],), candidates[best])


def candidates_of(subject: SubjectPlan) -> list[tuple[float, ...]]:
    """Penalties to compare: those configured, and the drawn ones."""
    ridge, n_groups = subject.plan.config.ridge, len(groups_of(subject))
    given, n_drawn = ridge.penalties[:n_groups], ridge.n_penalties_drawn
    return [given, *(drawn_penalties(n_groups, n_drawn, subject.plan.config.seed, subject.subject) if n_drawn else [])]
