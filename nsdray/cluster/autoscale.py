"""Growing a cluster: an autoscaler starts nodes for what is asked, and replicas are counted once when they start, so GPUs are
asked for first."""
from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator

import ray
from ray.autoscaler.sdk import request_resources
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.experimental.internal_kv import _internal_kv_get
from tqdm import tqdm

from nsdray.config import ClusterConfig

PATIENCE_S = 1800.0
"""Spot machines may take their time; a cluster that cannot grow should not be waited for over night."""
START_S = 60.0
"""An autoscaler says within seconds that it starts nodes. Where none does, the cluster cannot grow, or not that far."""


@contextlib.contextmanager
def enough_gpus(settings: ClusterConfig, patience_s: float = PATIENCE_S) -> Iterator[None]:
    """Wait until the cluster has `settings.n_gpus` GPUs, and let idle nodes go at the end. ValueError if they do not come."""
    wanted = settings.n_gpus or 0
    if _gpus() >= wanted:
        yield
        return
    request_resources(bundles=[{"GPU": 1}] * wanted)
    try:
        _wait(wanted, patience_s, min(START_S, patience_s))
        yield
    finally:
        request_resources(bundles=[])


def _gpus() -> int:
    return int(ray.cluster_resources().get("GPU", 0))


def _is_growing() -> bool:
    """Whether an autoscaler, of either version, is starting nodes; Ray tells it in the reports that `ray status` prints."""
    report = json.loads(_internal_kv_get("__autoscaling_status") or "{}").get("autoscaler_report") or {}
    status = get_cluster_status(ray.get_runtime_context().gcs_address)
    return any((report.get("pending_launches"), report.get("pending_nodes"), status.pending_launches, status.pending_nodes))


def _wait(wanted: int, patience_s: float, start_s: float) -> None:
    started, grows = time.monotonic(), False
    with tqdm(total=wanted, desc="wait for GPUs", unit="GPU") as progress:
        while (there := _gpus()) < wanted:
            progress.update(there - progress.n)
            grows = grows or there > progress.initial or _is_growing()
            if time.monotonic() - started > (patience_s if grows else start_s):
                minutes = (time.monotonic() - started) / 60
                raise ValueError(
                    f"cluster.n_gpus is {wanted}, but after {minutes:.2g} minutes the cluster has {there}"
                    f"{'' if grows else ' and starts no nodes'}. May it grow that far (max_workers in cluster.yaml, your "
                    "cloud's quota, spot machines there)? Or ask for fewer."
                )
            time.sleep(min(2.0, start_s))
        progress.update(there - progress.n)
