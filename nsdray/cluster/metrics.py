"""What a running job tells Prometheus, by way of Ray's own metrics agent. dashboards/ shows it.

Prometheus sees every name with ``ray_`` before it, and a counter's with ``_total`` behind it. A process hands its figures to
the agent every 10 s. Where no agent listens they go nowhere, and no result depends on them.
"""
from __future__ import annotations

from functools import cache
from typing import NamedTuple

import ray
from ray.util.metrics import Counter, Gauge, Histogram


class Definition(NamedTuple):
    """One metric."""

    kind: type[Counter] | type[Gauge] | type[Histogram]
    description: str
    labels: tuple[str, ...]


SECONDS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)
"""Bounds of a histogram's buckets."""

METRICS = {
    # replicas; stage: the replica's method, e.g. extract_vdvae or reconstruct_stage2; replica: its number in the pool
    "nsdray_images": Definition(Counter, "Images done by replicas", ("stage", "subject", "replica")),
    "nsdray_shards": Definition(Counter, "Shards written by replicas", ("stage", "subject", "replica")),
    "nsdray_shard_seconds": Definition(Histogram, "Seconds that a replica took for a shard", ("stage",)),
    "nsdray_replica_restarts": Definition(Counter, "Replicas that died and were started again", ()),
    # state: waiting and running for calls of replicas, submitted for tasks, of which Ray runs as many as fit
    "nsdray_queue": Definition(Gauge, "Calls or tasks that are not finished", ("stage", "state")),
    # reading
    "nsdray_trials_read": Definition(Counter, "Trials whose betas were read from session files", ("subject",)),
    "nsdray_training_images_read": Definition(Counter, "Training images read for networks, once per epoch", ("subject",)),
    # fitting; model: as in MLflow, e.g. gru-15
    "nsdray_ridge_blocks": Definition(Counter, "Blocks of targets fitted by ridge", ("model", "subject")),
    "nsdray_train_loss": Definition(Gauge, "Mean squared error of standardised targets, training images", ("model", "subject")),
    "nsdray_validation_loss": Definition(Gauge, "The same of the validation images", ("model", "subject")),
    "nsdray_epoch": Definition(Gauge, "Epochs done", ("model", "subject")),
    "nsdray_training_images_per_second": Definition(Gauge, "Speed of the last epoch, all workers", ("model", "subject")),
    # search; search: its folder's name
    "nsdray_search_trials": Definition(Gauge, "Trials that are pending, running or finished", ("search", "state")),
    "nsdray_search_best_score": Definition(Gauge, "Best mean of SSIM and PixCorr so far", ("search",)),
}


def record(name: str, value: float, **labels: object) -> None:
    """Add to a counter, set a gauge, or observe for a histogram. Outside of a Ray cluster, and for adding 0, nothing."""
    if not ray.is_initialized():
        return
    metric, tags, value = _metric(name), {label: str(own) for label, own in labels.items()}, float(value)
    if isinstance(metric, Gauge):
        metric.set(value, tags=tags)
    elif isinstance(metric, Histogram):
        metric.observe(value, tags=tags)
    elif value > 0:
        metric.inc(value, tags=tags)


def subject_label(partition: str) -> str:
    """The label "subject" of a partition: "1" of subject=01/train, else "shared"."""
    folder = partition.split("/")[0]
    return folder.removeprefix("subject=").lstrip("0") if folder.startswith("subject=") else "shared"


@cache
def _metric(name: str) -> Counter | Gauge | Histogram:
    kind, description, labels = METRICS[name]
    bounds = {"boundaries": list(SECONDS)} if kind is Histogram else {}
    return kind(name, description, tag_keys=labels, **bounds)
