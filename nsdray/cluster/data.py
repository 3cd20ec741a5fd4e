"""Betas and samples as Ray tasks, and the training stream as Ray Data.

The stream is nsdray's own order on top of Ray Data's execution: row groups are permuted by (seed, epoch), dealt to the
training workers, read by Ray Data tasks in that order, and rows are permuted within each block. So a stream is the same
on every run for the same number of workers, no row is dropped, and each row is read by one worker only.
(`streaming_split` drops the remainder of n / n_workers rows and deals blocks by arrival.)
"""
from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import ray
import torch

from nsdray.nsd.betas import SCALE, dead_voxels, read_session
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
    parts = [subject.plan.samples.read(subject.samples(split), p.name, ["image_id", "betas"]) for p in subject.parts(split)]
    return tuple(np.concatenate([view_column(part, name) for part in parts]) for name in ("image_id", "betas"))


def read_targets(subject: SubjectPlan, split: str, columns: Sequence[str], kind: str = "vdvae") -> np.ndarray:
    """Targets of one split, flattened and side by side: float16 (n_samples, n_targets)."""
    stage, partition = subject.plan.targets(kind), subject.targets(split)
    return np.concatenate([_flatten(stage.read(partition, p.name, columns), columns) for p in subject.parts(split)])


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


    def read(self, part: int, groups: Sequence[int] | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A part, or some of its row groups: image_ids (n,), betas (n, n_voxels) float32, targets (n, n_targets) float16."""
        name = self.parts[part].name
        sample = self.samples.read(self.samples_partition, name, ["image_id", "betas"], groups)
        target = self.targets.read(self.targets_partition, name, self.columns, groups)
        return view_column(sample, "image_id"), view_column(sample, "betas"), _flatten(target, self.columns)


def _read_block(source: Source, pieces: list, excluded: np.ndarray, key: list) -> dict[str, np.ndarray]:
    """Read row groups (part, group), drop the excluded images, and permute the rows by key."""
    reads = [source.read(part, [g for p, g in pieces if p == part]) for part in sorted({part for part, _ in pieces})]
    image_ids, betas, targets = (np.concatenate(arrays) for arrays in zip(*reads))
    keep = np.flatnonzero(~np.isin(image_ids, excluded))
    keep = keep[rng(*key).permutation(len(keep))]
    return {"betas": betas[keep], "targets": targets[keep]}


class TrainingStream:
    """The batches of one training worker, epoch after epoch, from one Ray Data execution.

    excluded: image_ids that are left out (the validation images). batch_size: rows per step over all workers. Each epoch
    has the same number of steps on every worker, and deals each worker's rows evenly over them, so no row is dropped.
    """

    def __init__(self, source: Source, excluded: np.ndarray, batch_size: int, n_epochs: int, seed: int, rank: int = 0,
                 world_size: int = 1):  # fmt: skip
        self.source, self.excluded, self.n_epochs, self.seed = source, excluded, n_epochs, seed
        self.rank, self.world_size, self._blocks = rank, world_size, None
        self.batch_size = max(2, batch_size // world_size)  # batch norm needs two rows
        kept = [np.flatnonzero(~np.isin(part.image_ids, excluded)) for part in source.parts]
        self.pieces = [
            (part, group, int(((rows // ROWS_PER_GROUP) == group).sum()))
            for part, rows in enumerate(kept)
            for group in range(-(-len(source.parts[part].image_ids) // ROWS_PER_GROUP))
        ]
        if len(self.pieces) < world_size:
            raise ValueError(
                f"{len(self.pieces)} row groups of {ROWS_PER_GROUP} training images cannot be shared among {world_size} "
                "training workers; lower --cluster.n-train-workers"
            )

    def _share(self, epoch: int, rank: int) -> list[tuple[int, int, int]]:
        order = rng(self.seed, "epoch", epoch).permutation(len(self.pieces))
        return [self.pieces[i] for i in order[rank :: self.world_size]]

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
            share = self._share(epoch, self.rank)
            for start in range(0, len(share), GROUPS_PER_BLOCK):
                pieces = [piece[:2] for piece in share[start : start + GROUPS_PER_BLOCK]]
                items.append({"block": json.dumps([pieces, [self.seed, "rows", epoch, self.rank, start]])})
        source, excluded = ray.put(self.source), self.excluded

        def read(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            pieces, key = json.loads(str(batch["block"][0]))
            return _read_block(ray.get(source), pieces, excluded, key)

        items = ray.data.from_items(items, override_num_blocks=len(items))
        # No CPU is asked for: beside trainings that hold all of them, the readers would wait for ever.
        blocks = items.map_batches(read, batch_size=None, num_cpus=0, concurrency=2)
        return iter(blocks.iter_batches(batch_size=None, prefetch_batches=2))

    def _epoch(self, epoch: int, blocks: Iterator[dict]) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
        totals = [sum(n for _, _, n in self._share(epoch, rank)) for rank in range(self.world_size)]
        n_steps = max(1, round(max(totals) / self.batch_size))
        sizes = [[len(x) for x in np.array_split(np.empty(total), n_steps)] for total in totals]
        pending: list[dict] = []
        for step in range(n_steps):
            size = sizes[self.rank][step]
            while sum(len(block["betas"]) for block in pending) < size:
                pending.append(next(blocks))
            betas, targets = (np.concatenate([block[k] for block in pending]) if len(pending) > 1 else pending[0][k]
                              for k in ("betas", "targets"))  # fmt: skip
            pending = [{"betas": betas[size:], "targets": targets[size:]}] if len(betas) > size else []
            n_global = sum(worker[step] for worker in sizes)
            yield torch.tensor(betas[:size]), torch.tensor(targets[:size]).float(), n_global
