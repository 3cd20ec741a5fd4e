"""Preflight on a cluster, as a job, and what Ray leaves open."""
from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from nsdray.cluster import results
from nsdray.cluster.autoscale import enough_gpus
from nsdray.cluster.measure import time_findings
from nsdray.cluster.preflight import cluster_findings, gpu_findings
from nsdray.config import ClusterConfig, StoreConfig
from nsdray.stages import Plan

CHECKOUT = Path(__file__).parents[2]


def test_a_cluster_of_two_cpus(finished):
    findings = {finding.what: finding for finding in cluster_findings(finished)}
    assert all(finding.ok for finding in findings.values())
    assert findings["cluster"].found == "1 nodes, 2 CPUs, 0 GPUs" and findings["replicas"].found == "2, each with 1 CPU"
    assert "no GPUs" in gpu_findings(finished)[0].found
    times = time_findings(finished)
    stages = "read betas", "VDVAE latents", "stage 1", "CLIP vision tokens", "CLIP text tokens", "stage 2"
    assert [finding.what for finding in times] == [f"time: {name}" for name in stages]
    assert all("(measured)" in finding.found for finding in times)


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
    with enough_gpus(ClusterConfig()):
        pass


def job(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "jobs/preflight.py", "mini", *arguments], cwd=CHECKOUT, text=True, capture_output=True,
                          timeout=300)  # fmt: skip


def test_the_job_s_table_and_exit_status(finished, tmp_path):
    small = ["--store.root", str(tmp_path), "--data.nsd-root", str(finished.layout.root), "--data.subjects", "1"]
    done = job(*small)
    assert done.returncode == 0, done.stderr
    for text in ("ok     subject 1", "ok     VDVAE", "ok     disk", "ok     replicas", "still to write"):
        assert text in done.stdout, done.stdout
    assert "WRONG" not in done.stdout
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
