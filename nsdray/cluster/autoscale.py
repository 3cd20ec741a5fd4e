"""Growing a cluster: an autoscaler starts nodes for what is asked, and replicas are counted once when they start, so GPUs are
asked for first."""
from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import ray
from ray.autoscaler.sdk import request_resources
from tqdm import tqdm

from nsdray.config import ClusterConfig

PATIENCE_S = 1800.0
"""Spot machines may take their time; a cluster that cannot grow should not be waited for over night."""


@contextlib.contextmanager
def enough_gpus(settings: ClusterConfig, patience_s: float = PATIENCE_S) -> Iterator[None]:
    """Wait until the cluster has `settings.n_gpus` GPUs, and let idle nodes go at the end. ValueError if they do not come."""
    wanted = settings.n_gpus or 0
    if _gpus() >= wanted:
        yield
        return
    request_resources(bundles=[{"GPU": 1}] * wanted)
    try:
        _wait(wanted, patience_s)
        yield
    finally:
        request_resources(bundles=[])


def _gpus() -> int:
    return int(ray.cluster_resources().get("GPU", 0))


def _wait(wanted: int, patience_s: float) -> None:
    deadline = time.monotonic() + patience_s
    with tqdm(total=wanted, desc="wait for GPUs", unit="GPU") as progress:
        while (there := _gpus()) < wanted:
            progress.update(there - progress.n)
            if time.monotonic() > deadline:
                raise ValueError(
                    f"cluster.n_gpus is {wanted}, but after {patience_s / 60:g} minutes the cluster has {there}. May it grow "
                    "that far (max_workers in cluster.yaml, your cloud's quota, spot machines there)? Or ask for fewer."
                )
            time.sleep(min(5.0, patience_s))
        progress.update(there - progress.n)
