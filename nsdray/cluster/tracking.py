"""MLflow, written by one process: an actor that finds its runs again by a tag.

Only `MlflowClient` is used: no active run, no global tracking URI. Everything is idempotent: a job that was killed and
started again writes into the same runs.
"""
from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag

from nsdray.store import Store, redacted

EXPERIMENT = "nsdray"
KEY = "nsdray.key"
PARENT = "mlflow.parentRunId"
CURVES = ("train_loss", "val_loss", "val_mse", "val_mae", "learning_rate", "samples_per_s")


def tracking_uri(store: Store) -> str:
    """$MLFLOW_TRACKING_URI, else a database below a local root."""
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if uri:
        return uri
    if not store.is_local:
        raise ValueError(
            f"the store's root {store.root} is an object store, which cannot hold MLflow's database. "
            "Start an MLflow server and set MLFLOW_TRACKING_URI."
        )
    return f"sqlite:///{store.base}/mlflow.db"


class Tracker:
    """Writes runs to MLflow. Keys are stage folders, e.g. ``metrics/gru-15-3f2a…/subject=01``."""

    def __init__(self, uri: str, artifacts: str | None):
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        self.client = MlflowClient(tracking_uri=uri)
        experiment = self.client.get_experiment_by_name(EXPERIMENT)
        self.experiment = (
            experiment.experiment_id if experiment else self.client.create_experiment(EXPERIMENT, artifact_location=artifacts)
        )
        self.runs: dict[str, str] = {}

    def start(self, key: str, name: str, params: dict[str, Any], tags: dict[str, str], parent: str | None = None) -> str:
        """Find the run with this key, or create it; returns its id."""
        if key not in self.runs:
            found = self.client.search_runs([self.experiment], f"tags.`{KEY}` = '{key}'", max_results=1)
            if found:
                run = found[0]
                self.client.update_run(run.info.run_id, "RUNNING")
            else:
                own = {KEY: key, "mlflow.runName": name} | ({PARENT: self.runs[parent]} if parent else {})
                run = self.client.create_run(self.experiment, tags=tags | own)
            self.runs[key] = run.info.run_id
            if not run.data.params:
                self.client.log_batch(run.info.run_id, params=[Param(k, redacted(str(v))[:500]) for k, v in params.items()])
        return self.runs[key]

    def log_epoch(self, key: str, metrics: dict[str, float]) -> None:
        """One point of every learning curve."""
        now, step = int(time.time() * 1000), int(metrics["epoch"])
        points = [Metric(name, float(metrics[name]), now, step) for name in CURVES]
        self.client.log_batch(self.runs[key], metrics=points)

    def complete_curves(self, key: str, history: list[dict[str, float]]) -> None:
        """Log the epochs that are not there yet (lost when a job was killed)."""
        logged = {point.step for point in self.client.get_metric_history(self.runs[key], CURVES[0])}
        for metrics in history:
            if metrics["epoch"] not in logged:
                self.log_epoch(key, metrics)

    def log_result(
        self, key: str, scores: dict[str, float], tags: dict[str, str], files: dict[str, bytes], step: int = 0
    ) -> None:
        """Scores (final ones, or those of a step), tags and artifacts (name to contents)."""
        now = int(time.time() * 1000)
        self.client.log_batch(
            self.runs[key],
            metrics=[Metric(name, value, now, step) for name, value in scores.items()],
            tags=[RunTag(name, redacted(value)) for name, value in tags.items()],
        )
        with tempfile.TemporaryDirectory() as folder:
            for name, contents in files.items():
                path = Path(folder) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(contents)
            if files:
                self.client.log_artifacts(self.runs[key], folder)

    def close(self, status: str) -> None:
        """End all runs that were started, "FINISHED" or "FAILED"."""
        for run in self.runs.values():
            self.client.set_terminated(run, status)


def start_tracker(store: Store) -> Any:
    """The tracker's actor, on this node."""
    here = ray.get_runtime_context().get_node_id()
    actor = ray.remote(num_cpus=0)(Tracker).options(
        scheduling_strategy=ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(here, soft=False)
    )
    return actor.remote(tracking_uri(store), artifacts_location(store))


def artifacts_location(store: Store) -> str | None:
    """Where MLflow keeps artifacts: a server decides itself (None); else beside an SQLite database, or in the store."""
    uri = tracking_uri(store)
    if uri.startswith(("http://", "https://")):
        return None
    if uri.startswith("sqlite:///"):
        return (Path(uri.removeprefix("sqlite:///")).absolute().parent / "mlartifacts").as_uri()
    if store.is_local:
        return Path(store.base, "mlartifacts").as_uri()
    return store.uri("mlartifacts").partition("?")[0]  # MLflow reaches object stores by its own means
