"""What a finished run has told Ray's metrics agent, read as Prometheus would read it."""
from __future__ import annotations

import re
import time
import urllib.request

import ray

from nsdray.cluster.metrics import record, subject_label
from nsdray.stages import Plan


def exported() -> list[tuple[str, dict[str, str], float]]:
    """Name, labels and value of every metric on this node."""
    node = ray.nodes()[0]
    page = urllib.request.urlopen(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics").read().decode()
    lines = re.findall(r"^(\w+)\{(.*)\} (\S+)$", page, re.MULTILINE)
    return [(name, dict(re.findall(r'(\w+)="(.*?)"', labels)), float(value)) for name, labels, value in lines]


def total(name: str, **labels: str) -> float:
    """Sum over everything with these labels."""
    return sum(value for found, own, value in exported() if found == name and labels.items() <= own.items())


def wait_for(wanted: float, name: str, **labels: str) -> float:
    """The total once it is what is wanted, or after half a minute."""
    for _ in range(60):
        if (found := total(name, **labels)) >= wanted:
            break
        time.sleep(0.5)
    return found


def test_counters_of_a_run_are_what_it_did(finished: Plan):
    """`finished`: subjects 1 and 2 with 96 training images each, and 12 test images that both saw."""
    for stage in ("extract_vdvae", "extract_clip_vision", "extract_clip_text"):
        for subject, n in {"1": 96, "2": 96, "shared": 12}.items():
            assert wait_for(n, "ray_nsdray_images_total", stage=stage, subject=subject) == n
    for subject in finished.subjects:
        own = {"subject": str(subject.subject)}
        assert wait_for(1, "ray_nsdray_trials_read_total", **own) >= len(subject.trials.image_id)
        assert wait_for(1, "ray_nsdray_ridge_blocks_total", model="ridge-3", **own) == 1
        epochs = wait_for(1, "ray_nsdray_training_images_read_total", **own) / 96
        assert epochs == int(epochs) >= 1
    n_shards = total("ray_nsdray_shards_total")
    assert n_shards > 0 and wait_for(n_shards, "ray_nsdray_shard_seconds_count") == n_shards


def test_a_counter_of_a_process_that_has_ended_is_kept(cluster):
    @ray.remote(num_cpus=0)
    def count() -> None:
        record("nsdray_images", 7, stage="test", subject="1", replica=0)

    ray.get([count.remote() for _ in range(3)])
    assert wait_for(21, "ray_nsdray_images_total", stage="test") == 21


def test_a_gauge_is_seen_once_it_is_set(cluster):
    """Not for ever: what is not set again goes from the agent's page."""
    record("nsdray_queue", 3, stage="test", state="waiting")
    assert wait_for(3, "ray_nsdray_queue", stage="test", state="waiting") == 3


def test_subject_label():
    assert [subject_label(p) for p in ("subject=01/train", "subject=10", "shared1000/test")] == ["1", "10", "shared"]
