"""Preflight on a cluster, as a job, and what Ray leaves open."""
from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from nsdray.cluster import autoscale, preflight, results
from nsdray.cluster.autoscale import enough_gpus
from nsdray.cluster.measure import n_made, time_findings
from nsdray.cluster.preflight import checked, cluster_findings
from nsdray.config import ClusterConfig, StoreConfig
from nsdray.stages import Plan

CHECKOUT = Path(__file__).parents[2]


def test_a_cluster_of_two_cpus(finished):
    findings = {finding.what: finding for finding in cluster_findings(finished)}
    assert all(finding.ok for finding in findings.values())
    assert findings["cluster"].found == "1 nodes, 2 CPUs, 0 GPUs" and findings["replicas"].found == "2, each with 1 CPU"
    assert "its share of a node with 2: " in findings["replica"].found
    times = time_findings(finished)
    stages = "read betas", "VDVAE latents", "stage 1", "CLIP vision tokens", "CLIP text tokens", "stage 2"
    assert [finding.what for finding in times] == [f"time: {name}" for name in (*stages, "training")]
    assert all("(measured)" in finding.found for finding in times[:-1]) and "not measured" in times[-1].found
    n_sources = len(finished.config.models) + 1  # with the control "mean"; of the truth, once for both subjects
    assert n_made(finished, "stage1") == n_made(finished, "stage2") == 12 * (2 * n_sources + 1)


def test_bfloat16_is_measured_as_bfloat16(finished, monkeypatch):
    import torch

    from nsdray.cluster import measure

    seen = set()
    monkeypatch.setattr(measure, "timed", lambda work: seen.add(torch.is_autocast_enabled("cpu")) or 1.0)
    config = finished.config
    plan = Plan(replace(config, targets=replace(config.targets, dtype="bfloat16"), clip=replace(config.clip, dtype="bfloat16"),
                        stage2=replace(config.stage2, model="none"),
                        data=replace(config.data, nsd_root=str(finished.layout.root))))  # fmt: skip
    measure.seconds_per_image(plan, [int(i) for i in plan.subjects[0].image_ids("test")[:2]])
    assert seen == {True}


def test_every_node_is_looked_at_again_once_the_cluster_has_grown(finished, monkeypatch):
    looked = []
    monkeypatch.setattr(preflight, "check_shared_root", lambda plan, tracked: looked.append(tracked))
    with checked(finished, ("betas", "stimuli"), tracked=False):
        assert looked == [False]


def test_a_job_that_could_never_be_scheduled_says_so(finished, tmp_path):
    """At the start, and not after hours of waiting: nothing is made."""
    config = replace(finished.config, store=StoreConfig(str(tmp_path)), cluster=ClusterConfig(n_train_workers=3, n_replicas=5),
                     data=replace(finished.config.data, nsd_root=str(finished.layout.root)))  # fmt: skip
    with pytest.raises(ValueError, match="2 things to mend first") as caught:
        results.train_all_subjects(Plan(config))
    assert "n_replicas is 5" in str(caught.value) and "3 training workers need 3 CPUs" in str(caught.value)
    assert not list(tmp_path.glob("betas-*/*"))


def test_gpus_that_do_not_come(cluster):
    with pytest.raises(ValueError, match="n_gpus is 3, but after .* minutes the cluster has 0"):
        with enough_gpus(ClusterConfig(n_gpus=3), patience_s=0.2):
            raise AssertionError("nothing was waited for")


def test_a_cluster_that_starts_no_nodes_is_not_waited_for(cluster, monkeypatch):
    monkeypatch.setattr(autoscale, "START_S", 0.2)
    started = time.monotonic()
    with pytest.raises(ValueError, match="n_gpus is 3, but after .* minutes the cluster has 0 and starts no nodes"):
        with enough_gpus(ClusterConfig(n_gpus=3)):
            raise AssertionError("nothing was waited for")
    assert time.monotonic() - started < 30
    report = {"autoscaler_report": {"pending_launches": {"a100": 1}, "pending_nodes": []}}
    monkeypatch.setattr(autoscale, "_internal_kv_get", lambda _: json.dumps(report))
    with pytest.raises(ValueError, match="the cluster has 0. May it grow"):
        with enough_gpus(ClusterConfig(n_gpus=3), patience_s=1.0):
            raise AssertionError("nothing was waited for")
    with enough_gpus(ClusterConfig()):
        pass  # those that are there


def job(*arguments: str) -> subprocess.CompletedProcess:
    """jobs/preflight.py, which waits for nodes for a second only."""
    code = """
import runpy, sys; sys.path.insert(0, "jobs"); import cli
from nsdray.cluster import autoscale
autoscale.START_S = 1.0
runpy.run_path("jobs/preflight.py", run_name="__main__")
"""
    return subprocess.run([sys.executable, "-c", code, "mini", *arguments], cwd=CHECKOUT, text=True, capture_output=True,
                          timeout=300)  # fmt: skip


def test_the_job_s_table_and_exit_status(finished, tmp_path):
    small = ["--store.root", str(tmp_path), "--data.nsd-root", str(finished.layout.root), "--data.subjects", "1"]
    done = job(*small)
    assert done.returncode == 0, done.stderr
    for text in ("ok     subject 1", "ok     VDVAE", "ok     disk", "ok     replicas", "still to write"):
        assert text in done.stdout, done.stdout
    assert "WRONG" not in done.stdout
    done = job(*small, "--cluster.n-gpus", "2")
    assert done.returncode == 1 and "WRONG  root and GPUs" in done.stdout and "ok     VDVAE" in done.stdout, done.stderr
    done = job(*small, "--targets.checkpoint", "/nowhere.th", "--stage2.folder", "/nowhere")
    assert done.returncode == 1 and done.stdout.count("WRONG") == 3 and "/nowhere.th is not there" in done.stdout


def test_nothing_listens_beyond_loopback():
    """Ray, started by a job: every socket of the driver and of all its children."""
    code = """
import sys; sys.path.insert(0, "jobs"); import cli
import psutil, ray
from nsdray.cluster.run import start_ray
start_ray(None)
ray.get(ray.remote(num_cpus=0)(lambda: None).remote())
me = psutil.Process()
for process in [me, *me.children(recursive=True)]:
    for socket in process.net_connections("inet"):
        if socket.status == psutil.CONN_LISTEN:
            print(socket.laddr.ip)
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment["PYTHONPATH"] = str(CHECKOUT)
    done = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, text=True, capture_output=True, timeout=120,
                          env=environment)  # fmt: skip
    addresses = done.stdout.split()
    assert len(addresses) >= 8, done.stderr
    assert {address.removeprefix("::ffff:") for address in addresses} == {"127.0.0.1"}
