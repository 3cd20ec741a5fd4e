"""What is done once for a subject's ridges: betas, kernel, factors, and the choice of alphas and penalties.

Shared alphas and penalties of voxel groups are chosen on a seeded sample of a kind's targets, here; an alpha per target while
its block is at hand (`nsdray.cluster.ridge`).
"""
from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
from threadpoolctl import threadpool_limits

from nsdray.cluster.data import read_samples, read_targets
from nsdray.nsd.rois import voxel_groups
from nsdray.regressors.banded import drawn_penalties, voxel_penalties
from nsdray.regressors.linalg import Eigen, Scratch, find_device, to_numpy
from nsdray.regressors.ridge import RidgeKernel, ridge_kernel, training_basis
from nsdray.regressors.ridge_grid import AlphaScores, Smoothers, alpha_scores, make_smoothers
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
    curve: list[dict[str, float]] = field(default_factory=list)
    """What the alpha was chosen by; as `curve_of`."""


def on_all_its_cpus(task: Callable) -> Callable:
    """A task whose linear algebra has a thread for each CPU that the task has. Ray's workers start with one thread, and a worker
    with another setting would have to be started first."""

    @functools.wraps(task)
    def with_threads(*arguments: Any) -> Any:
        cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 1)
        with threadpool_limits(max(1, int(cpus))):
            return task(*arguments)

    return with_threads


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
@on_all_its_cpus
def make_kernel(betas: Betas, choice: Choice, dtype: str) -> RidgeKernel:
    """The kernel for a choice's penalties, without the betas, which have their own place in the object store."""
    kernel = betas.kernel(choice.penalties, dtype, find_device())
    return dataclasses.replace(kernel, betas=None, gram_=to_numpy(kernel.gram_), device=None)


@ray.remote
@on_all_its_cpus
def decompose(kernel: RidgeKernel) -> Eigen:
    """The eigendecomposition that serves all alphas and all kinds of targets."""
    return dataclasses.replace(kernel, device=find_device()).decompose().to(None)


def held_out_rows(subject: SubjectPlan) -> np.ndarray | None:
    """Training images whose leave-one-out predictions the moments come from; None means all."""
    held_out = subject.plan.config.ridge.held_out
    return None if held_out == "all" else sampled_rows(subject)[: None if held_out == "sample" else 0]


@ray.remote(num_returns=2)
@on_all_its_cpus
def solve_kernel(subject: SubjectPlan, betas: Betas, kernel: RidgeKernel, eigen: Eigen | None, choice: Choice,
                 with_basis: bool) -> tuple[Smoothers, np.ndarray | None]:  # fmt: skip
    """The smoothers at the chosen alphas; and with_basis what training targets, or with several alphas dual coefficients, are
    multiplied with to decode new images: `training_basis`, float32."""
    device = find_device()
    kernel = dataclasses.replace(kernel, betas=betas.train, device=device)
    if eigen is None:
        factors = [kernel.factorise(alpha) for alpha in choice.alphas]
    else:
        own = eigen.to(device)
        factors = [kernel.at(alpha, own) for alpha in choice.alphas]
    smoothers = make_smoothers(factors, betas.test, held_out_rows(subject), list(betas.groups.values()) or None).to(None)
    inverse = factors[0].inverse if len(factors) == 1 else None
    return smoothers, training_basis(kernel, inverse, np.float32) if with_basis else None


def scored_apart(settings: dict[str, Any]) -> bool:
    """Whether targets choose among alphas by other leave-one-out predictions than those that train_moments needs anyway."""
    return settings["per_target"] and (settings["selection"] != "sample" or settings["held_out"] != "sample")


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
@on_all_its_cpus
def score_penalties(subject: SubjectPlan, betas: Betas, kernel: RidgeKernel | None, eigen: Eigen | None,
                    penalties: tuple[float, ...], settings: list[dict[str, Any]], *targets: np.ndarray
                    ) -> list[AlphaScores]:  # fmt: skip
    """Scores of each alpha for some targets of each kind. kernel, eigen: None makes those of the penalties."""
    device = find_device()
    if kernel is None:
        kernel = betas.kernel(penalties, settings[0]["dtype"], device)
    kernel = dataclasses.replace(kernel, device=device)
    eigen, rows, scratch = kernel.decompose() if eigen is None else eigen.to(device), sampled_rows(subject), Scratch()
    scores = []
    for own, some in zip(settings, targets):
        pieces = pieces_of(some.shape[1])
        blocks = (centre_targets(some[:, piece], kernel.dtype, device, scratch=scratch) for piece in pieces)
        found = [alpha_scores(kernel, eigen, own["alphas"], block, own["selection"], rows) for block in blocks]
        scores.append(join_scores(found))
    return scores


def join_scores(parts: Sequence[AlphaScores]) -> AlphaScores:
    """Scores of several blocks of targets as those of one."""
    images = None
    if parts[0].images is not None:
        images = np.average([part.images for part in parts], 0, [part.targets.shape[1] for part in parts])
    return AlphaScores(np.concatenate([part.targets for part in parts], 1), images)


def curve_of(alphas: Sequence[float], scores: AlphaScores) -> list[dict[str, float]]:
    """At each alpha the mean leave-one-out R2, and its standard error: over the left-out images, or by "gcv", which knows no
    single ones, over targets. Ascending."""
    each = scores.targets if scores.images is None else scores.images
    errors = each.std(1, ddof=1) / np.sqrt(each.shape[1]) if each.shape[1] > 1 else np.zeros(len(each))
    return [{"alpha": float(alphas[a]), "loo_r2": float(scores.targets[a].mean()), "error": float(errors[a])}
            for a in np.argsort(alphas)]  # fmt: skip


@ray.remote(num_cpus=1)
def choose(settings: dict[str, Any], candidates: list[tuple[float, ...]], kind: int, *scores: list[AlphaScores]) -> Choice:
    """The penalties and the alpha with the best mean R2; with an alpha per target, the penalties whose best alphas have it.
    scores: of each candidate, a list over kinds."""
    own, alphas = [some[kind] for some in scores], settings["alphas"]
    if settings["per_target"]:
        return Choice(tuple(alphas), candidates[int(np.argmax([some.targets.max(0).mean() for some in own]))])
    best, alpha = np.unravel_index(np.argmax([some.targets.mean(1) for some in own]), (len(candidates), len(alphas)))
    return Choice((alphas[alpha],), candidates[best], curve_of(alphas, own[best]) if len(alphas) > 1 else [])


def candidates_of(subject: SubjectPlan) -> list[tuple[float, ...]]:
    """Penalties to compare: those configured, and the drawn ones."""
    ridge, n_groups = subject.plan.config.ridge, len(groups_of(subject))
    given, n_drawn = ridge.penalties[:n_groups], ridge.n_penalties_drawn
    return [given, *(drawn_penalties(n_groups, n_drawn, subject.plan.config.seed, subject.subject) if n_drawn else [])]
