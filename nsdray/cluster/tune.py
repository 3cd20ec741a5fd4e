"""Ray Tune over networks, depths, widths and rates (`nsdray.cluster.trials`): which depth is worth its cost.

ASHA stops what falls behind, but for the first trials, one per depth, which train to their end so that depths can be compared;
Optuna's TPE proposes what comes next. Interrupted, the search goes on from its folder.
"""
from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import optuna
import pandas as pd
import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch
from tqdm import tqdm

from nsdray.cluster import run
from nsdray.cluster.metrics import record
from nsdray.cluster.preflight import checked
from nsdray.cluster.results import flatten
from nsdray.cluster.trials import (
    FAILED,
    OWN,
    SCORED,
    Space,
    SubjectData,
    build,
    own_device,
    run_trial,
    score_ridge,
    share_subject,
    summarise,
    training_settings,
    with_hidden,
)
from nsdray.config import Config
from nsdray.stages import Plan
from nsdray.store import Store
from nsdray.training import count_parameters, free_memory

FORGET_S = 60.0
"""Seconds after which a finished trial's checkpoint is deleted: by then Tune has noted that it is finished (every 10 s)."""
TRACKERS: dict[str, Any] = {}
"""Of the searches that this process is at, by folder: Tune keeps its callbacks in the search's folder, and an actor does not
outlive its process."""


def search_plan(config: Config) -> Plan:
    """The plan whose betas and VDVAE latents a search needs: as deep as its deepest trial, without stage 2."""
    for model in config.search.models:
        settings = getattr(config, model)
        if settings.sampling != "mean" or settings.pretrained:
            raise ValueError(f"a search trains from scratch on means: leave --{model}.sampling and --{model}.pretrained alone")
    deepest = max(config.search.n_layers)
    targets = replace(config.targets, n_layers=max(deepest, config.targets.n_layers))
    return Plan(replace(config, n_layers=deepest, targets=targets, stage2=replace(config.stage2, model="none")))


class TrialLogger(tune.Callback):
    """Every trial as an MLflow run under the search's, figures for Prometheus, and a progress bar; deletes the checkpoints of
    finished trials."""

    def __init__(self, parent: str, n_trials: int, is_simulated: bool):
        self.parent, self.n_trials, self.is_simulated, self.best = parent, n_trials, is_simulated, FAILED
        self.tracker = self.progress = None
        self.finished: dict[str, float] = {}
        """Trials whose checkpoints are still there, and since when they are finished."""

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"tracker": None, "progress": None, "finished": {}}

    def setup(self, *_: Any, **__: Any) -> None:
        self.tracker = TRACKERS[self.parent]
        self.progress = tqdm(total=self.n_trials, desc="search", unit="trial")
        self.record_trials([])

    def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict, **_: Any) -> None:
        log_trial(self.tracker, self.parent, trial.trial_id, trial.config, result, self.is_simulated)
        self.best = max(self.best, result["score"])
        self.progress.set_postfix(best=f"{self.best:.3f}", refresh=False)
        record("nsdray_search_best_score", self.best, search=self.parent.removeprefix("searches/"))
        self.record_trials(trials)
        self.forget(trials)

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **_: Any) -> None:
        self.finished[trial.trial_id] = time.monotonic()
        self.progress.n = sum(other.is_finished() for other in trials)
        self.progress.refresh()
        self.record_trials(trials)
        status = (trial.last_result or {}).get("status", "")
        if status not in ("trained", "unfinished"):
            tqdm.write(f"  trial {trial.config}: {status}")

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **_: Any) -> None:
        tqdm.write(f"  trial {trial.config}: failed")

    def forget(self, trials: list) -> None:
        """Delete the checkpoints of trials that have been finished for a while."""
        for trial in trials:
            if time.monotonic() - self.finished.get(trial.trial_id, float("inf")) > FORGET_S:
                del self.finished[trial.trial_id]
                delete_checkpoint(trial.checkpoint)

    def record_trials(self, trials: list) -> None:
        """Tell Prometheus how many trials there are."""
        finished, running = sum(t.is_finished() for t in trials), sum(t.status == "RUNNING" for t in trials)
        states = {"pending": self.n_trials - finished - running, "running": running, "finished": finished}
        for state, n in states.items():
            record("nsdray_search_trials", n, search=self.parent.removeprefix("searches/"), state=state)

    def on_experiment_end(self, trials: list, **_: Any) -> None:
        self.record_trials(trials)
        self.progress.close()


def delete_checkpoint(checkpoint: tune.Checkpoint | None) -> None:
    """Delete a checkpoint, if there is one."""
    if checkpoint is not None:
        with contextlib.suppress(FileNotFoundError):
            checkpoint.filesystem.delete_dir(checkpoint.path)


def log_trial(
    tracker: Any, parent: str, trial_id: str, space: dict, result: dict[str, Any], is_simulated: bool, once: bool = False
) -> None:
    """A trial's figures at one of its rungs, to its MLflow run. once: unless they are there."""
    key, name = f"{parent}/{trial_id}", f"{space['model']}-{space['n_layers']}{' (SIMULATED)' if is_simulated else ''}"
    tags = {"kind": "trial", "data": "simulated" if is_simulated else "nsd"}
    tracker.start.remote(key, name, space, tags, parent)
    scores = {name: float(value) for name, value in result.items() if is_column(name)}
    tracker.log_result.remote(key, scores, {"status": result["status"][:400]}, {}, result["epoch"], once)


COLUMNS = ("score", "score_error", *SCORED, "val_mse", "val_mae", "n_parameters", "train_s", "decode_s", "epochs")
"""Of the table."""

def is_column(name: str) -> bool:
    column, _, subject = name.rpartition("_")
    return name in COLUMNS or (column in OWN and subject.isdecimal())


def choices(config: Config) -> tuple[dict[str, Any], list[Space]]:
    """Tune's search space, and the trials that come first: each depth with the first network as it is configured."""
    search = config.search
    space = {
        "model": tune.choice(list(search.models)),
        "n_layers": tune.choice(list(search.n_layers)),
        "width": tune.choice(list(search.width)),
        "dropout": tune.uniform(*search.dropout),
        "learning_rate": tune.loguniform(*search.learning_rate),
    }
    base = getattr(config, search.models[0])
    width = min(search.width, key=lambda w: abs(w - 1))
    first = {"model": base.name, "width": width, "dropout": float(np.clip(base.dropout, *search.dropout)),
             "learning_rate": float(np.clip(base.learning_rate, *search.learning_rate))}  # fmt: skip
    return space, [first | {"n_layers": n} for n in search.n_layers[: search.n_trials]]


class FirstToTheEnd(ASHAScheduler):
    """ASHA that stops none of the trials in `first`."""

    def __init__(self, first: list[Space], **settings: Any):
        super().__init__(**settings)
        self.first = first

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict) -> str:
        decision = super().on_trial_result(tune_controller, trial, result)
        return self.CONTINUE if trial.config in self.first else decision


def trial(choice: dict[str, Any], plan: Plan, data: list[SubjectData], memory: int) -> None:
    """`run_trial` of a choice."""
    run_trial(with_hidden(plan.config, choice), plan, data, memory)


def claim_folder(store: Store, folder: str, space: dict[str, Any]) -> None:
    """Write space.json, or check that the one that is there is ours."""
    text = json.dumps(space, indent=1, sort_keys=True)
    if "space.json" not in store.sizes(folder):
        store.write_bytes(f"{folder}/space.json", text.encode())
    found, ours = flatten(json.loads(store.read_bytes(f"{folder}/space.json"))), flatten(json.loads(text))
    differing = [f"{name} is {found.get(name)} there, {ours.get(name)} here"
                 for name in sorted(found.keys() | ours.keys()) if found.get(name) != ours.get(name)]  # fmt: skip
    if differing:
        raise ValueError(
            f"{store.uri(folder)} was made by another search: {'; '.join(differing)}. Choose another --search.name, or move that "
            "folder away"
        )


def search_space(plan: Plan) -> dict[str, Any]:
    """All that a search's results depend on, and not on where it runs."""
    config = plan.config
    search = {name: value for name, value in asdict(config.search).items() if name not in ("cpus_per_trial", "gpus_per_trial")}
    return {"search": search, "samples": plan.samples.hash, "targets": plan.targets().hash,
            "subjects": {s.folder: s.inputs for s in plan.subjects}, "seed": config.seed, "stage1": asdict(config.stage1),
            "suite": config.evaluation.suites[0],
            "networks": {name: asdict(getattr(config, name)) for name in config.search.models}}  # fmt: skip


def run_search(plan: Plan, folder: str, tracker: Any) -> pd.DataFrame:
    """Do or finish the search in a folder of the store; a row per trial, and per ridge reference."""
    config = plan.config
    claim_folder(plan.store, folder, search_space(plan))
    data, resources = [share_subject(subject) for subject in plan.subjects], trial_resources(plan)
    refs = [ref for own in data for ref in (own.seen, own.arrays.fixed, *own.arrays.columns.values())]
    ray.wait(refs, num_returns=len(refs))  # before trials hold the CPUs that reading needs
    ridge = score_ridge.options(**{f"num_{name}s": amount for name, amount in resources.items()})
    reference = ray.get([ridge.remote(plan, own, own.seen) for own in data])
    trials = fit_trials(plan, folder, data, tracker)
    for result in trials:  # an earlier job may have ended before MLflow had them
        if not result.error and "status" in result.metrics:
            log_trial(tracker, folder, result.metrics["trial_id"], result.config, result.metrics, plan.is_simulated, once=True)
    table = [trial_row(config, result) for result in trials]
    for n_layers, own in zip(sorted(config.search.n_layers), zip(*reference)):
        figures = {subject.subject: each for subject, each in zip(plan.subjects, own)}
        table.append({"model": "ridge", "n_layers": n_layers, "status": "reference", **summarise(figures)})
    return pd.DataFrame(table)


def trial_resources(plan: Plan) -> dict[str, float]:
    """What a trial asks Ray for."""
    search = plan.config.search
    gpus = {"gpu": search.gpus_per_trial} if ray.cluster_resources().get("GPU", 0) else {}
    return {"cpu": search.cpus_per_trial} | gpus


def trials_of_nodes(resources: dict[str, float]) -> dict[str, int]:
    """How many trials each node holds at a time, by its id; nodes that hold none are left out."""
    nodes = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
    held = {node: min(own.get(name.upper(), 0) / amount for name, amount in resources.items()) for node, own in nodes.items()}
    return {node: int(n) for node, n in held.items() if n >= 1}


@ray.remote(num_cpus=0)
def free_here() -> int:
    """Bytes that are free on a node, or on its GPU."""
    return free_memory(own_device())


def trial_memory(resources: dict[str, float]) -> int:
    """Bytes that a trial may take: what is free once the data are there, shared by all trials of a node (or of a GPU); the least
    of all nodes."""
    held, place = trials_of_nodes(resources), ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
    gpus = resources.get("gpu", 0)
    free = ray.get([free_here.options(num_gpus=gpus, scheduling_strategy=place(node, soft=True)).remote() for node in held])
    return int(min((own * min(1.0, gpus) if gpus else own / n for own, n in zip(free, held.values())), default=2**62))


def require_room(plan: Plan, n_at_once: int) -> None:
    """ValueError if checkpoints would not fit: of each trial that runs two of the largest networks, as one is kept until the next
    is written, and a minute longer when the trial is finished."""
    search, store = plan.config.search, plan.store
    if not store.is_local:
        return
    widest = {"width": max(search.width), "n_layers": max(search.n_layers), "dropout": 0.0}
    spaces = [with_hidden(plan.config, widest | {"model": model}) for model in search.models]
    parameters = [sum(count_parameters(partial(build, plan, subject, space)) for subject in plan.subjects) for space in spaces]
    needed, free = 2 * n_at_once * 4 * 4 * max(parameters), shutil.disk_usage(store.base).free
    if needed > free:
        raise ValueError(
            f"checkpoints of {n_at_once} trials at a time take up to {needed / 1e9:.1f} GB below {store.root}, and "
            f"{free / 1e9:.1f} GB are free: free some, choose another --store.root, or search narrower or shallower networks"
        )


def fit_trials(plan: Plan, folder: str, data: list[SubjectData], tracker: Any) -> tune.ResultGrid:
    """Start Tune, or go on with what a search left in its folder."""
    search, resources = plan.config.search, trial_resources(plan)
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")  # trials checkpoint often
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "10")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    require_room(plan, min(search.n_trials, max(1, sum(trials_of_nodes(resources).values()))))
    function = tune.with_parameters(trial, plan=plan, data=data, memory=trial_memory(resources))
    trainable = tune.with_resources(function, resources)
    path, filesystem = plan.store.storage(f"{folder}/trials")
    TRACKERS[folder] = tracker
    try:
        if tune.Tuner.can_restore(path, filesystem):
            tuner = tune.Tuner.restore(path, trainable, resume_errored=True, storage_filesystem=filesystem)
        else:
            tuner = new_tuner(plan, folder, trainable)
        found = tuner.fit()
    finally:
        del TRACKERS[folder]
    for result in found:
        if not result.error:
            delete_checkpoint(result.checkpoint)
    return found


def new_tuner(plan: Plan, folder: str, trainable: Any) -> tune.Tuner:
    """A search from its start."""
    config, search = plan.config, plan.config.search
    space, first = choices(config)
    storage_path, storage_filesystem = plan.store.storage(folder)
    n_epochs = max(training_settings(config, model).n_epochs for model in search.models)
    tune_config = tune.TuneConfig(
        metric="score", mode="max", num_samples=search.n_trials,
        search_alg=OptunaSearch(seed=config.seed, points_to_evaluate=first),
        scheduler=FirstToTheEnd(first, time_attr="epoch", max_t=n_epochs, grace_period=min(search.grace_epochs, n_epochs),
                                reduction_factor=search.reduction),
    )  # fmt: skip
    run_config = tune.RunConfig(name="trials", storage_path=storage_path, storage_filesystem=storage_filesystem, verbose=0,
                                callbacks=[TrialLogger(folder, search.n_trials, plan.is_simulated)],
                                checkpoint_config=tune.CheckpointConfig(num_to_keep=1),
                                failure_config=tune.FailureConfig(max_failures=config.cluster.max_retries))  # fmt: skip
    return tune.Tuner(trainable, param_space=space, tune_config=tune_config, run_config=run_config)


def trial_row(config: Config, result: Any) -> dict[str, Any]:
    """A trial's choice and its last figures."""
    metrics, choice = result.metrics or {}, result.config
    row = {name: value for name, value in metrics.items() if is_column(name)}
    row |= {"status": f"failed: {result.error}" if result.error else metrics.get("status", "failed: it reported nothing")}
    return (with_hidden(config, choice) if choice else {"model": "unknown"}) | {"score": FAILED} | row


def prepare_search(plan: Plan) -> None:
    """Betas and latents, as for any run."""
    with checked(plan, ("betas", "stimuli", "captions", "checkpoints")):
        if not trials_of_nodes(resources := trial_resources(plan)):
            asked = ", ".join(f"{amount:g} {name.upper()}" for name, amount in resources.items())
            raise ValueError(
                f"a trial asks for {asked}, which no node of the cluster has: it would wait for ever. Ask for less by "
                "--search.cpus-per-trial or --search.gpus-per-trial"
            )
        run.prepare_betas(plan)
        run.extract_targets(plan)
