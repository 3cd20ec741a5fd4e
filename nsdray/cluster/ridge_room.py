"""How much memory a subject's ridges take, how many tasks and subjects that lets run side by side, and whether there is room."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import ray

from nsdray.cluster.ridge_factors import N_TARGETS_BLOCK, groups_of, scored_apart, sizes_of
from nsdray.regressors.ridge_memory import FLOAT, Weights, check_memory, ridge_bytes
from nsdray.stages import Fit, SubjectPlan

SMALL = 1e10
"""Multiplications of a kernel below which one CPU is enough."""
REMEDY = ("Use a larger node, --ridge.dtype float32, --ridge.weights none, fewer --ridge.alphas with --ridge.per-target, or "
          "--ridge.held-out sample.")  # fmt: skip


def needed_bytes(subject: SubjectPlan, fits: Sequence[Fit], keep: bool, n_workers: int = 1) -> dict[str, int]:
    """`ridge_bytes` of a subject's ridges. keep: with what lies in the object store meanwhile."""
    plan, config = subject.plan, subject.plan.config.ridge
    n, n_test = len(subject.image_ids("train")), len(subject.image_ids("test"))
    by_fit = [sizes_of(subject, fit, plan.columns(fit.kind)) for fit in fits]
    settings = [plan.model(fit).config["settings"] for fit in fits]
    sizes = [size for own in by_fit for size in own]
    written = [max(own) for own, setting in zip(by_fit, settings) if setting["weights"]]
    shared_choice = (len(config.alphas) > 1 and not config.per_target) or config.n_penalties_drawn > 0
    return ridge_bytes(
        n, len(subject.voxels.index), n_test, {"all": n, "sample": n_test, "none": 0}[config.held_out],
        min(N_TARGETS_BLOCK, sum(sizes)), np.dtype(config.dtype), n_alphas=len(config.alphas) if config.per_target else 1,
        n_groups=max(1, len(groups_of(subject))), decomposed=len(config.alphas) > 1 or config.n_penalties_drawn > 0,
        scored=any(scored_apart(setting) for setting in settings),
        n_searched=sum(min(config.n_targets_search, sum(own)) for own in by_fit) if shared_choice else 0, keep=keep,
        n_columns=min(sum(sizes), N_TARGETS_BLOCK + max(sizes)),
        weights=Weights(max(written), config.coefficients == "primal") if written else None, n_workers=n_workers,
    )  # fmt: skip


def writing_bytes(subject: SubjectPlan, fit: Fit) -> int:
    """What writing a decoder and its predictions holds: some rows of all targets, raw, rescaled in a few steps, and as a table;
    and some values of every target and voxel."""
    n_targets = sum(sizes_of(subject, fit, subject.plan.columns(fit.kind)))
    n_rows = min(subject.plan.config.data.rows_per_part, len(subject.image_ids("test")))
    return FLOAT * (5 * n_rows * n_targets + 24 * n_targets + 4 * len(subject.voxels.index))


def store_bytes(subject: SubjectPlan, fits: Sequence[Fit]) -> int:
    """What a subject's ridges have in the object store, with their predictions."""
    n_targets = sum(sum(sizes_of(subject, fit, subject.plan.columns(fit.kind))) for fit in fits)
    return needed_bytes(subject, fits, keep=True, n_workers=0)["targets"] + FLOAT * len(subject.image_ids("test")) * n_targets


def memory_needed(subject: SubjectPlan, fits: Sequence[Fit], cpus: float, memory: float) -> dict[str, int]:
    """Bytes that a subject's ridges hold at once, by phase, on one node of so many CPUs and bytes for tasks: in the store, and by
    as many workers as it runs side by side."""
    n_workers = workers_at_once(cpus, memory, needed_bytes(subject, fits, keep=False)["targets"])
    needed, stored = needed_bytes(subject, fits, keep=True, n_workers=n_workers), store_bytes(subject, fits)
    own = needed["targets"] - needed_bytes(subject, fits, keep=True, n_workers=0)["targets"]
    return needed | {"targets": stored + own, "writing": stored + max(writing_bytes(subject, fit) for fit in fits)}


def workers_at_once(cpus: float, memory: float, each: int) -> int:
    """Tasks that a node runs side by side: one a CPU, and no more than fit into its memory."""
    return max(1, min(int(cpus), int(memory // max(1, each))))


def subjects_at_once(store: Sequence[int]) -> int:
    """How many subjects may be in the object store together, so that it does not spill to disk: at least one. store: bytes of
    each."""
    room = 0.8 * ray.cluster_resources().get("object_store_memory", 0)
    return max(1, int((np.cumsum(sorted(store, reverse=True)) <= room).sum()))


def task_options(subject: SubjectPlan, needed: Mapping[str, int], n_at_once: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Ray's options for the tasks that do one thing for a whole subject, of which n_at_once are in work, and for those that share
    its targets. needed: bytes, so that no more tasks run at once than fit into a node."""
    plan, nodes = subject.plan, [node["Resources"] for node in ray.nodes() if node["Alive"]]
    most = max(needed[phase] for phase in needed if phase != "targets")
    whole = {"num_cpus": 1, "memory": capped(most, nodes)}
    share = {"num_cpus": 1, "memory": capped(needed["targets"], nodes)}
    if ray.cluster_resources().get("GPU", 0):
        return whole | {"num_gpus": 1}, share | {"num_gpus": plan.config.cluster.gpus_per_replica}
    n, p = len(subject.image_ids("train")), len(subject.voxels.index)
    cpus = int(max(node.get("CPU", 1) for node in nodes)) // n_at_once
    if cpus > 1 and n * n * p > SMALL:
        whole |= {"num_cpus": cpus}
    return whole, share


def writing_options(subject: SubjectPlan, fit: Fit) -> dict[str, Any]:
    """The same for writing a decoder."""
    return {"num_cpus": 1, "memory": capped(writing_bytes(subject, fit), [n["Resources"] for n in ray.nodes() if n["Alive"]])}


def capped(n_bytes: int, nodes: Sequence[Mapping[str, float]]) -> int:
    """A request for memory that the largest node can meet."""
    return int(min(n_bytes, 0.9 * max(node.get("memory", 0) for node in nodes)))


def check_room(subject: SubjectPlan, fits: Sequence[Fit]) -> None:
    """ValueError with the numbers if a subject's ridges do not fit into the largest node."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    largest = max(nodes, key=lambda node: node.get("memory", 0) + node.get("object_store_memory", 0))
    memory = largest.get("memory", 0)
    needed = memory_needed(subject, fits, largest.get("CPU", 1), memory)
    where = f"the largest node of the cluster, for subject {subject.subject},"
    check_memory(needed, memory + largest.get("object_store_memory", 0), where, REMEDY)
