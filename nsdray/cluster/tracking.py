"""MLflow, written by one process: an actor that finds its runs again by a tag.

Only `MlflowClient` is used: no active run, no global tracking URI. Everything is idempotent: a job that was killed and
started again writes into the same runs. What is to be written is kept in order and sent by a thread, so a server that is
away holds up nothing; `settle` waits for it before results count as logged.
"""
from __future__ import annotations

import os
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from queue import Queue
from typing import Any, NamedTuple

import ray
import requests
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from ray.exceptions import RayActorError
from sqlalchemy.exc import OperationalError
from tqdm import tqdm

from nsdray.store import Store, is_out_of_space, redacted

EXPERIMENT = "nsdray"
KEY = "nsdray.key"
PARENT = "mlflow.parentRunId"
CURVES = ("train_loss", "val_loss", "val_mse", "val_mae", "learning_rate", "samples_per_s")
RETRY_S = 2.0
"""Seconds between attempts to write to a server that is away."""
WAIT_S = 600.0
"""Seconds without a write that a job with nothing left to compute waits for the server."""
MOST_TRIES = 30
"""Attempts at a write that a server answers by an error of its own (500): it may pass, or be the fault of this write for ever."""


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


class State(NamedTuple):
    """How far a tracker is."""

    unsent: list[str]
    """Names of the runs for which something is still to be written."""
    n_done: int
    """Writes that are done with."""
    trouble: str
    """Why the last attempt failed, if MLflow is away."""
    refused: list[str]
    """What MLflow would not take, and why."""


class Tracker:
    """Writes runs to MLflow. Keys are stage folders, e.g. ``metrics/gru-15-3f2a…/subject=01``. Methods return at once."""

    def __init__(self, uri: str, artifacts: str | None):
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # blind ones would make runs twice; `_sent` looks before
        self.uri, self.artifacts, self.experiment = uri, artifacts, ""
        self.runs: dict[str, str] = {}
        self.names: dict[str, str] = {}
        self.ended: set[str] = set()
        self.epochs: dict[str, set[int]] = {}
        self.queue: Queue[tuple[str, str, Callable[..., None], tuple]] = Queue()
        self.lock, self.unsent, self.n_done = threading.Lock(), Counter(), 0
        self.trouble, self.refused = "", []

    def connect(self) -> State:
        """Try to reach MLflow, and send from here on. ValueError if the address can never work."""
        try:
            self._find_experiment()
        except Exception as error:
            if not is_away(error):
                raise ValueError(f"MLflow at {redacted(self.uri)}: {one_line(error)}") from error
            self.trouble = one_line(error)
        threading.Thread(target=self._send, daemon=True).start()
        return self.state()

    def state(self) -> State:
        with self.lock:
            return State([name for name, n in self.unsent.items() if n], self.n_done, self.trouble, self.refused)

    def start(self, key: str, name: str, params: dict[str, Any], tags: dict[str, str], parent: str | None = None) -> None:
        """Find the run with this key, or create it."""
        if key not in self.names:
            self.names[key] = name
            self._later(key, self._start, name, params, tags, parent)

    def log_epoch(self, key: str, metrics: dict[str, float]) -> None:
        """One point of every learning curve, unless it is there, or the run was logged as a whole by an earlier job."""
        if key in self.names:
            self._later(key, self._log_epoch, metrics, now())

    def complete_curves(self, key: str, history: list[dict[str, float]]) -> None:
        """Log the epochs that are not there yet (lost when a job was killed)."""
        for metrics in history:
            self.log_epoch(key, metrics)

    def log_result(
        self, key: str, scores: dict[str, float], tags: dict[str, str], files: dict[str, bytes], step: int = 0, once: bool = False
    ) -> None:
        """Scores (final ones, or those of a step), tags and artifacts (name to contents). once: unless that step is there."""
        self._later(key, self._log_result, scores, tags, files, now(), step, once)

    def finish(self, key: str) -> None:
        """End a run that has all its results, whatever becomes of others."""
        self.ended.add(key)
        self._later(key, self._end, "FINISHED")

    def close(self, status: str) -> None:
        """End all other runs that were started, "FINISHED" or "FAILED"."""
        for key in self.names.keys() - self.ended:
            self._later(key, self._end, status)

    # The sending thread.

    def _later(self, key: str, write: Callable[..., None], *arguments: Any) -> None:
        name = self.names.get(key, key)
        with self.lock:
            self.unsent[name] += 1
        self.queue.put((name, key, write, arguments))

    def _send(self) -> None:
        while True:
            name, key, write, arguments = self.queue.get()
            n_tries = 1
            while not self._sent(name, key, write, arguments, n_tries):
                n_tries += 1
                time.sleep(RETRY_S)
            with self.lock:
                self.unsent[name] -= 1
                self.n_done += 1

    def _sent(self, name: str, key: str, write: Callable[..., None], arguments: tuple, n_tries: int) -> bool:
        """Whether a write is done with: False if it must be tried again."""
        try:
            if not self.experiment:
                self._find_experiment()
            write(key, *arguments)
        except Exception as error:
            if is_away(error) and (status_of(error) != 500 or n_tries < MOST_TRIES):
                self.trouble = one_line(error)
                return False
            self.refused.append(f"{name}: {one_line(error)}")
        self.trouble = ""
        return True

    def _find_experiment(self) -> None:
        self.client = MlflowClient(tracking_uri=self.uri)  # opens a database at once
        found = self.client.get_experiment_by_name(EXPERIMENT)
        try:
            self.experiment = (
                found.experiment_id if found else self.client.create_experiment(EXPERIMENT, artifact_location=self.artifacts)
            )
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another job was faster
                raise
            self.experiment = self.client.get_experiment_by_name(EXPERIMENT).experiment_id

    def _start(self, key: str, name: str, params: dict[str, Any], tags: dict[str, str], parent: str | None) -> None:
        found = self.client.search_runs([self.experiment], f"tags.`{KEY}` = '{key}'", max_results=1)
        if found:
            run = found[0]
            self.client.update_run(run.info.run_id, "RUNNING")
            self.epochs[key] = {point.step for point in self.client.get_metric_history(run.info.run_id, CURVES[-1])}
        else:
            own = {KEY: key, "mlflow.runName": name} | ({PARENT: self.runs[parent]} if parent else {})
            run = self.client.create_run(self.experiment, tags=tags | own)
        self.runs[key] = run.info.run_id
        if not run.data.params:
            self.client.log_batch(run.info.run_id, params=[Param(k, redacted(str(v))[:500]) for k, v in params.items()])

    def _log_epoch(self, key: str, metrics: dict[str, float], when: int) -> None:
        step, logged = int(metrics["epoch"]), self.epochs.setdefault(key, set())
        if step not in logged:
            points = [Metric(name, float(metrics[name]), when, step) for name in CURVES]
            self.client.log_batch(self.runs[key], metrics=points)
            logged.add(step)

    def _log_result(self, key: str, scores: dict[str, float], tags: dict[str, str], files: dict[str, bytes], when: int,
                    step: int, once: bool) -> None:  # fmt: skip
        if once and step in {point.step for point in self.client.get_metric_history(self.runs[key], next(iter(scores)))}:
            return
        self.client.log_batch(
            self.runs[key],
            metrics=[Metric(name, value, when, step) for name, value in scores.items()],
            tags=[RunTag(name, redacted(value)) for name, value in tags.items()],
        )
        with tempfile.TemporaryDirectory() as folder:
            for name, contents in files.items():
                path = Path(folder) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(contents)
            if files:
                self.client.log_artifacts(self.runs[key], folder)

    def _end(self, key: str, status: str) -> None:
        self.client.set_terminated(self.runs[key], status)


PASSING = (429, 500, 502, 503, 504)
"""Status codes of a server that may do better later."""


def now() -> int:
    """Milliseconds, as MLflow counts."""
    return int(time.time() * 1000)


def is_away(error: Exception) -> bool:
    """Whether a write that failed may succeed later: nobody answers, the server or database is in trouble, a disk is full."""
    if status := status_of(error):
        return status in PASSING
    known = ConnectionError, TimeoutError, requests.RequestException, OperationalError
    boto = "EndpointConnectionError", "ConnectTimeoutError", "ReadTimeoutError", "ConnectionClosedError"
    return isinstance(error, known) or is_out_of_space(error) or type(error).__name__ in boto


def status_of(error: Exception) -> int | None:
    """The HTTP status that a write failed with, if it has one."""
    if isinstance(error, requests.HTTPError) and error.response is not None:
        return error.response.status_code
    return error.get_http_status_code() if isinstance(error, MlflowException) else None


def one_line(error: Exception) -> str:
    """The error, or its end if it is long: the cause comes last."""
    text = redacted(" ".join(f"{type(error).__name__}: {error}".split()))
    return text if len(text) <= 200 else f"… {text[-200:]}"


def start_tracker(store: Store) -> Any:
    """The tracker's actor, on this node. If MLflow does not answer, that is said, and what is to be logged is kept."""
    here = ray.get_runtime_context().get_node_id()
    actor = ray.remote(num_cpus=0)(Tracker).options(
        scheduling_strategy=ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(here, soft=False)
    )
    uri = tracking_uri(store)
    tracker = actor.remote(uri, artifacts_location(store))
    state = ray.get(tracker.connect.remote())
    if state.trouble:
        tqdm.write(f"  warning: MLflow at {redacted(uri)} does not answer; what is to be logged is kept and sent later "
                   f"({state.trouble})")  # fmt: skip
    return tracker


def settle(store: Store, tracker: Any, others: Iterable[str] = (), seconds: float | None = None) -> None:
    """Wait until everything has been written, as long as something is written every `seconds` (None: WAIT_S). ConnectionError
    with the runs that are not logged, which are those and others; ValueError if MLflow refused something."""
    seconds, uri, n_done, progress = WAIT_S if seconds is None else seconds, redacted(tracking_uri(store)), -1, None
    remedy = (
        f"All results are below {redacted(store.root)}. See to it, then start the job again: it computes nothing that is "
        "finished, and logs what is not logged (jobs/report.py logs a report again)."
    )
    try:
        while (state := ray.get(tracker.state.remote())).unsent:
            if state.n_done > n_done:
                n_done, since = state.n_done, time.monotonic()
            quiet = time.monotonic() - since
            if quiet >= seconds:
                runs = list(dict.fromkeys([*others, *state.unsent]))
                raise ConnectionError(f"MLflow at {uri} has taken nothing for {seconds:g} seconds ({state.trouble}). "
                                      f"Not logged: {', '.join(runs)}. {remedy}")  # fmt: skip
            if quiet > 5:
                progress = progress or tqdm(total=round(seconds), desc=f"wait for MLflow at {uri}", unit="s")
                progress.update(round(quiet) - progress.n)
            time.sleep(0.1)
    except RayActorError as error:
        raise ConnectionError(f"the process that writes to MLflow at {uri} has died. {remedy}") from error
    finally:
        if progress is not None:
            progress.close()
    if state.refused:
        raise ValueError(f"MLflow at {uri} refused: {'; '.join(state.refused[:3])}. {remedy}")


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
