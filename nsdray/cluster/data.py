"""Betas and samples as Ray tasks, and the training stream as Ray Data.

The stream is nsdray's own order on top of Ray Data's execution: row groups are permuted by (seed, epoch), read by Ray Data
tasks in that order, and rows are permuted within each block and dealt to the training workers in turn. So the steps of an
epoch hold the same rows on every run, whatever the number of workers, and no row is dropped. (`streaming_split` drops the
remainder of n / n_workers rows and deals blocks by arrival.) Each worker reads all row groups and keeps its rows; the workers
of a node read through one page cache.

Many trainings on the same images, as in a search, share them through the object store instead: `share_arrays`.
"""
from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import ray
import torch

from nsdray.cluster.metrics import record, subject_label
from nsdray.nsd.betas import SCALE, dead_voxels, read_session
from nsdray.nsd.repeats import draw_repeats
from nsdray.regressors.linalg import Scratch
from nsdray.regressors.scaling import moments, zscore
from nsdray.seeds import rng
from nsdray.stages import Part, SubjectPlan
from nsdray.store import ROWS_PER_GROUP, Inputs, Stage, table, view_column

GROUPS_PER_BLOCK = 8
"""Row groups that are read, mixed and handed over together: 512 rows."""


@ray.remote(num_cpus=1)
def write_voxels(subject: SubjectPlan, inputs: Inputs) -> None:
    """Write voxels.parquet."""
    voxels = subject.voxels
    columns = {"index": voxels.index, "rois": list(voxels.roi_names)}
    if voxels.ncsnr is not None:
        columns["ncsnr"] = voxels.ncsnr
    subject.plan.betas.write(subject.folder, "voxels.parquet", table(columns), inputs)


@ray.remote(num_cpus=1)
def write_session(subject: SubjectPlan, session: int, shard: str, inputs: Inputs) -> int:
    """Read one session's voxels and write its trials; returns the number of dead (constant) voxels."""
    betas = read_session(subject.sessions[session], subject.voxels)
    trials = subject.trials
    rows = np.flatnonzero(trials.session == session)
    columns = {name: getattr(trials, name)[rows] for name in ("trial", "image_id", "repeat", "is_test")}
    subject.plan.betas.write(subject.folder, shard, table(columns | {"betas": betas}), inputs)
    record("nsdray_trials_read", len(rows), subject=subject.subject)
    return int(dead_voxels(betas).sum())


@ray.remote(num_cpus=1)
def write_samples(subject: SubjectPlan, missing: dict[str, list[str]]) -> None:
    """Average the betas of each image over its repeats, and write the missing parts of each split."""
    plan = subject.plan
    parts = {split: [p for p in subject.parts(split) if p.name in names] for split, names in missing.items()}
    wanted_ids = np.concatenate([p.image_ids for split_parts in parts.values() for p in split_parts])
    row_of = {int(image_id): row for row, image_id in enumerate(wanted_ids)}
    counts = np.zeros(len(wanted_ids), np.int16)
    max_repeats = int(np.unique(subject.trials.image_id, return_counts=True)[1].max())
    repeats = np.zeros((len(wanted_ids), max_repeats, len(subject.voxels.index)), np.int16)
    for shard in subject.betas_wanted:
        if not shard.startswith("session="):
            continue
        data = plan.betas.read(subject.folder, shard, ["image_id", "betas"])
        for image_id, betas in zip(view_column(data, "image_id"), view_column(data, "betas")):
            row = row_of.get(int(image_id))
            if row is not None:
                repeats[row, counts[row]] = betas
                counts[row] += 1
    for split, split_parts in parts.items():
        for part in split_parts:
            rows = [row_of[int(i)] for i in part.image_ids]
            means = np.stack([repeats[r, : counts[r]].mean(0, dtype=np.float64) for r in rows]) / SCALE
            columns = {"image_id": part.image_ids, "n_repeats": counts[rows], "betas": means.astype(np.float32),
                       "repeats": repeats[rows]}  # fmt: skip
            plan.samples.write(subject.samples(split), part.name, table(columns), subject.inputs)


def read_samples(subject: SubjectPlan, split: str) -> tuple[np.ndarray, np.ndarray]:
    """All image_ids (n,) and mean betas (n, n_voxels) float32 in percent signal change of one split."""
    ids = subject.image_ids(split)
    betas, start = np.empty((len(ids), len(subject.voxels.index)), np.float32), 0
    for part in subject.parts(split):  # no second copy: these are the largest array of a ridge regression
        data = subject.plan.samples.read(subject.samples(split), part.name, ["image_id", "betas"])
        own = slice(start, start + len(part.image_ids))
        ids[own], betas[own] = view_column(data, "image_id"), view_column(data, "betas")
        start = own.stop
    return ids, betas


def read_targets(
    subject: SubjectPlan, split: str, columns: Sequence[str], kind: str = "vdvae", scratch: Scratch | None = None
) -> np.ndarray:
    """Targets of one split, in the samples' order, flattened and side by side: float16 (n_samples, n_targets). scratch: where
    to."""
    parts, ids = subject.target_parts(split), subject.image_ids(split)
    stored = np.concatenate([part.image_ids for part in parts])
    names = [part.name for part in parts]
    values = read_columns(subject.plan.targets(kind), subject.targets(split), names, columns, len(stored), scratch)
    if np.array_equal(stored, ids):
        return values
    order = np.argsort(stored)
    return values[order[np.searchsorted(stored, ids, sorter=order)]]


def read_columns(
    stage: Stage, partition: str, parts: Sequence[str], columns: Sequence[str], n_rows: int, scratch: Scratch | None = None
) -> np.ndarray:
    """Array columns of some parts (n_rows in all), flattened and side by side: (n_rows, n_values) in the columns' dtype.
    scratch: where to."""
    out, start = None, 0
    for part in parts:
        data = stage.read(partition, part, columns)
        views = [view_column(data, name).reshape(data.num_rows, -1) for name in columns]
        if out is None:
            out = (scratch or Scratch()).empty((n_rows, sum(view.shape[1] for view in views)), views[0].dtype)
        np.concatenate(views, 1, out=out[start : start + data.num_rows])
        start += data.num_rows
    assert start == n_rows, f"{stage.uri(partition)} holds {start} rows, not {n_rows}"
    return out


def _flatten(data, columns: Sequence[str]) -> np.ndarray:
    arrays = [view_column(data, name) for name in columns]
    return np.concatenate([a.reshape(len(a), -1) for a in arrays], 1)


@dataclass(frozen=True)
class Source:
    """Where the rows of a training stream lie: samples and targets with the same parts and order."""

    samples: Stage
    samples_partition: str
    targets: Stage
    targets_partition: str
    parts: list[Part]
    columns: list[str]

    @classmethod
    def of(cls, subject: SubjectPlan, split: str, columns: Sequence[str], kind: str = "vdvae") -> Source:
        plan = subject.plan
        partitions = subject.samples(split), plan.targets(kind), subject.targets(split)
        return cls(plan.samples, *partitions, subject.parts(split), list(columns))


    def read(
        self, part: int, groups: Sequence[int] | None = None, draw: tuple[str, int, int] | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A part, or some of its row groups: image_ids (n,), betas (n, n_voxels) float32, targets (n, n_targets) float16.
        draw: (sampling, seed, epoch) of `draw_repeats`; None: the mean over repeats, and single repeats are not read."""
        name = self.parts[part].name
        names = ["image_id", "betas"] if draw is None else ["image_id", "repeats", "n_repeats"]
        sample = self.samples.read(self.samples_partition, name, names, groups)
        target = self.targets.read(self.targets_partition, name, self.columns, groups)
        image_ids, betas, *n_repeats = (view_column(sample, name) for name in names)
        if draw is not None:
            betas = draw_repeats(betas, *n_repeats, image_ids, *draw)
        return image_ids, betas, _flatten(target, self.columns)


def _read_block(
    source: Source, pieces: list, excluded: np.ndarray, key: list, mine: slice, draw: tuple[str, int, int] | None
) -> dict[str, np.ndarray]:
    """Read row groups (part, group), drop the excluded images, permute the rows by key, and keep mine."""
    parts = sorted({part for part, _ in pieces})
    reads = [source.read(part, [g for p, g in pieces if p == part], draw) for part in parts]
    image_ids, betas, targets = (np.concatenate(arrays) for arrays in zip(*reads))
    record("nsdray_training_images_read", len(image_ids), subject=subject_label(source.samples_partition))
    keep = np.flatnonzero(~np.isin(image_ids, excluded))
    keep = keep[rng(*key).permutation(len(keep))][mine]
    return {"betas": betas[keep], "targets": targets[keep]}


def steps_per_epoch(n_rows: Sequence[int], batch_size: int, world_size: int) -> int:
    """Steps in which subjects with n_rows training images each are gone through together, some batch_size images a step.

    Every worker needs two of a subject's images in each step: batch norm cannot do with less.
    """
    if min(n_rows) < 2 * world_size:
        raise ValueError(
            f"{min(n_rows)} training images are too few for {world_size} training workers with at least two each; "
            "lower --cluster.n-train-workers"
        )
    return min(max(1, round(sum(n_rows) / max(2, batch_size))), min(n_rows) // (2 * world_size))


class TrainingStream:
    """The batches of one training worker, epoch after epoch, from one Ray Data execution.

    excluded: image_ids that are left out (the validation images). n_steps: steps of an epoch; its rows are dealt evenly over
    them, so none is dropped, and a step's rows are the same whatever world_size: a worker has every world_size-th of them.
    sampling: "mean" over repeats, or as `draw_repeats`.
    """

    def __init__(self, source: Source, excluded: np.ndarray, n_steps: int, n_epochs: int, seed: int, rank: int = 0,
                 world_size: int = 1, sampling: str = "mean"):  # fmt: skip
        self.source, self.excluded, self.n_epochs, self.seed = source, excluded, n_epochs, seed
        self.rank, self.world_size, self.sampling, self._blocks = rank, world_size, sampling, None
        kept = [np.flatnonzero(~np.isin(part.image_ids, excluded)) for part in source.parts]
        self.pieces = [
            (part, group, int(((rows // ROWS_PER_GROUP) == group).sum()))
            for part, rows in enumerate(kept)
            for group in range(-(-len(source.parts[part].image_ids) // ROWS_PER_GROUP))
        ]
        n_rows = sum(n for *_, n in self.pieces)
        self.edges = np.cumsum([0, *(len(rows) for rows in np.array_split(np.empty(n_rows), n_steps))])

    def __call__(self, epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
        """The batches of an epoch: betas (b, n_voxels) float32, targets (b, n_targets) float32, and the number of rows of
        this step over all workers. The first call starts the stream; the next ones must ask for the next epochs."""
        if self._blocks is None:
            self._blocks = self._start(epoch)
        return self._epoch(epoch, self._blocks)

    def _start(self, first_epoch: int) -> Iterator[dict[str, np.ndarray]]:
        context = ray.data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        items = []
        for epoch in range(first_epoch, self.n_epochs):
            order, n_before = rng(self.seed, "epoch", epoch).permutation(len(self.pieces)), 0
            for start in range(0, len(order), GROUPS_PER_BLOCK):
                pieces = [self.pieces[i] for i in order[start : start + GROUPS_PER_BLOCK]]
                first = (self.rank - n_before) % self.world_size
                items.append({"block": json.dumps([[piece[:2] for piece in pieces], epoch, start, first])})
                n_before += sum(n for *_, n in pieces)
        source, excluded, every = ray.put(self.source), self.excluded, self.world_size
        seed, sampling = self.seed, self.sampling

        def read(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            pieces, epoch, start, first = json.loads(str(batch["block"][0]))
            draw = None if sampling == "mean" else (sampling, seed, epoch)
            key = [seed, "rows", epoch, 0, start]  # 0: the order of the first worker, which all follow
            return _read_block(ray.get(source), pieces, excluded, key, slice(first, None, every), draw)

        items = ray.data.from_items(items, override_num_blocks=len(items))
        # No CPU is asked for: beside trainings that hold all of them, the readers would wait for ever.
        blocks = items.map_batches(read, batch_size=None, num_cpus=0, concurrency=2)
        return iter(blocks.iter_batches(batch_size=None, prefetch_batches=2))

    def _epoch(self, epoch: int, blocks: Iterator[dict]) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
        own = -(-(self.edges - self.rank).clip(0) // self.world_size)  # of the rows before each edge
        pending: list[dict] = []
        for size, n_global in zip(np.diff(own), np.diff(self.edges)):
            while sum(len(block["betas"]) for block in pending) < size:
                pending.append(next(blocks))
            betas, targets = (np.concatenate([block[k] for block in pending]) if len(pending) > 1 else pending[0][k]
                              for k in ("betas", "targets"))  # fmt: skip
            pending = [{"betas": betas[size:], "targets": targets[size:]}] if len(betas) > size else []
            yield torch.tensor(betas[:size]), torch.tensor(targets[:size]).float(), int(n_global)


@dataclass(frozen=True)
class Columns:
    """Target columns (n, n_i) side by side; rows are put together when they are asked for."""

    arrays: Sequence[np.ndarray]

    def __len__(self) -> int:
        return len(self.arrays[0])

    def __getitem__(self, rows: np.ndarray | slice) -> np.ndarray:
        """Targets (n_rows, n_targets)."""
        return np.concatenate([array[rows] for array in self.arrays], 1)


class TrainingArrays(NamedTuple):
    """A subject's training images, split into those to fit to and those held out. All read-only."""

    betas: np.ndarray
    """z-scored by the moments of the images to fit to, (n, n_voxels) float32."""
    targets: Columns
    """(n, n_targets) float16, raw."""
    val_betas: np.ndarray
    val_targets: Columns
    scale: dict[str, np.ndarray]
    """Moments of the images to fit to: betas_mean, betas_std (n_voxels,), latents_mean, latents_std (n_targets,)."""


@dataclass(frozen=True)
class SharedArrays:
    """A subject's `TrainingArrays` in Ray's object store, for many trainings: read once, sent once to each node, and mapped by
    every process there without a copy. They last as long as the process that made them."""

    fixed: ray.ObjectRef
    columns: dict[str, ray.ObjectRef]
    """One object per target column, so that a training of two layers maps only these."""

    def get(self, columns: Sequence[str]) -> TrainingArrays:
        """The arrays with these target columns, in any process of the cluster."""
        betas, val_betas, scale = ray.get(self.fixed)
        targets, val_targets, means, stds = zip(*ray.get([self.columns[name] for name in columns]))
        scale = scale | {"latents_mean": np.concatenate(means), "latents_std": np.concatenate(stds)}
        return TrainingArrays(betas, Columns(targets), val_betas, Columns(val_targets), scale)


def share_arrays(source: Source, held_out: np.ndarray) -> SharedArrays:
    """Read training images into the object store, split into those to fit to and held_out (image_ids)."""
    is_held_out = np.isin(np.concatenate([part.image_ids for part in source.parts]), held_out)
    shared = ray.put(source), ray.put(is_held_out)
    columns = {name: _share_column.remote(*shared, name) for name in source.columns}
    return SharedArrays(_share_betas.remote(*shared), columns)


@ray.remote(num_cpus=1)
def _share_betas(source: Source, is_held_out: np.ndarray) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """z-scored betas of the images to fit to and of the held-out ones, and the former's moments."""
    parts = [source.samples.read(source.samples_partition, part.name, ["betas"]) for part in source.parts]
    betas = np.concatenate([view_column(part, "betas") for part in parts])
    mean, std = moments(betas[~is_held_out])
    rows = (zscore(betas[mask], mean, std) for mask in (~is_held_out, is_held_out))
    return *rows, {"betas_mean": mean, "betas_std": std}


@ray.remote(num_cpus=1)
def _share_column(source: Source, is_held_out: np.ndarray, column: str) -> tuple[np.ndarray, ...]:
    """Targets (n, n_i) float16 of the images to fit to and of the held-out ones, and the former's moments."""
    parts = [source.targets.read(source.targets_partition, part.name, [column]) for part in source.parts]
    targets = np.concatenate([_flatten(part, [column]) for part in parts])
    return targets[~is_held_out], targets[is_held_out], *moments(targets[~is_held_out])
