"""Ray Tune over networks, depths, widths and rates: which depth is worth its cost.

Latent errors of different depths cannot be compared, so a trial is judged by pictures: it trains a network for each subject,
side by side, and at every rung decodes the validation images' predicted latents to stage-1 pictures, whose score is the mean of
SSIM and PixCorr over images and subjects. All trials of a node map one copy of the data (`share_arrays`). ASHA stops what
falls behind, Optuna's TPE proposes what comes next. Interrupted, the search goes on from its folder.
"""
from __future__ import annotations

import json
import os
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optuna
import pandas as pd
import ray
import torch
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch
from tqdm import tqdm

from nsdray.cluster import run
from nsdray.cluster.actors import fitting_batch_size, memory_share, precision, vdvae_bytes
from nsdray.cluster.data import SharedArrays, Source, TrainingArrays, share_arrays
from nsdray.cluster.metrics import record
from nsdray.cluster.preflight import checked
from nsdray.cluster.train import validation_images
from nsdray.config import Config
from nsdray.generators.stage1 import decode_pictures, enlarge
from nsdray.metrics.perceptual import pixel_scores
from nsdray.models.vdvae import VDVAE, load_vdvae
from nsdray.nsd.stimuli import Stimuli
from nsdray.regressors import REGRESSORS
from nsdray.regressors.ridge import factorise
from nsdray.regressors.scaling import moments, rescale
from nsdray.seeds import derive
from nsdray.stages import VDVAE_CONFIGS, Plan, SubjectPlan, layer_name
from nsdray.store import Store
from nsdray.training import (
    DivergedError,
    LocalContext,
    TooLargeError,
    free_memory,
    memory_batches,
    predict,
    require_memory,
    train,
)

FAILED = -1.0
"""Score of a trial that diverged or did not fit into memory: the worst that SSIM and PixCorr can be."""
SCORED = ("ssim", "pixcorr")
Space = dict[str, Any]
"""One trial's choice: model, n_layers, hidden, dropout, learning_rate."""


class SubjectData(NamedTuple):
    """What trials need of a subject; arrays and pictures lie in the object store."""

    subject: SubjectPlan
    arrays: SharedArrays
    image_ids: np.ndarray
    """All validation images, in the order of the arrays."""
    seen: ray.ObjectRef
    """The first n_images of them, as the subject saw them, uint8 (n, h, w, 3)."""


def search_plan(config: Config) -> Plan:
    """The plan whose betas and VDVAE latents a search needs: as deep as its deepest trial, without stage 2."""
    for model in config.search.models:
        settings = getattr(config, model)
        if settings.sampling != "mean" or settings.pretrained:
            raise ValueError(f"a search trains from scratch on means: leave --{model}.sampling and --{model}.pretrained alone")
    deepest = max(config.search.n_layers)
    targets = replace(config.targets, n_layers=max(deepest, config.targets.n_layers))
    return Plan(replace(config, n_layers=deepest, targets=targets, stage2=replace(config.stage2, model="none")))


def share_subject(subject: SubjectPlan) -> SubjectData:
    """Start reading a subject's training images into the object store."""
    settings = subject.plan.config
    fraction = min(getattr(settings, model).validation_fraction for model in settings.search.models)
    held_out = validation_images(subject, fraction)
    ids = subject.image_ids("train")
    ids = ids[np.isin(ids, held_out)]
    seen = read_seen.remote(subject, ids[: settings.search.n_images])
    columns = [layer_name(i) for i in range(max(settings.search.n_layers))]
    return SubjectData(subject, share_arrays(Source.of(subject, "train", columns), held_out), ids, seen)


@ray.remote(num_cpus=1)
def read_seen(subject: SubjectPlan, image_ids: np.ndarray) -> np.ndarray:
    """Pictures as the subject saw them, uint8 (n, h, w, 3)."""
    with Stimuli(subject.plan.layout.stimuli) as stimuli:
        return stimuli.read(image_ids)


class _Paused(Exception):
    """The next rung is reached."""


@dataclass
class PausingContext(LocalContext):
    """A training that stops at an epoch and goes on when it is called again."""

    until: int = 0
    saved: dict | None = None

    def report(self, metrics: dict[str, float], checkpoint: dict | None) -> None:
        self.saved = checkpoint
        if metrics["epoch"] + 1 >= self.until:
            raise _Paused

    def resume(self) -> dict | None:
        return self.saved


class SubjectTraining:
    """One subject's network in a trial."""

    def __init__(self, plan: Plan, data: SubjectData, space: Space, device: torch.device, saved: dict | None):
        settings = getattr(plan.config, space["model"])
        self.data, self.layers = data, [layer_name(i) for i in range(space["n_layers"])]
        self.arrays = data.arrays.get(self.layers)
        n_voxels, n_targets = self.arrays.betas.shape[1], len(self.arrays.scale["latents_mean"])
        sizes = settings.sizes() | {"hidden": space["hidden"], "dropout": space["dropout"]}
        with torch.device("meta"):
            n_parameters = sum(p.numel() for p in REGRESSORS[space["model"]](n_voxels, n_targets, **sizes).parameters())
        self.n_parameters = n_parameters
        require_memory(n_parameters, n_voxels, n_targets, settings.batch_size, free_memory(device))
        seed = plan.config.seed
        torch.manual_seed(derive(seed, "initial weights", data.subject.subject))
        self.network = REGRESSORS[space["model"]](n_voxels, n_targets, **sizes).to(device)
        self.context = PausingContext(device, saved=saved)
        names = ("weight_decay", "patience", "warmup_epochs", "clip_norm", "n_epochs")
        self.settings = {name: getattr(settings, name) for name in names}
        self.settings |= {"learning_rate": space["learning_rate"], "seed": seed, "checkpoint_every": 1}
        self.batches = memory_batches(self.arrays.betas, self.arrays.targets, settings.batch_size, seed)
        held_out = np.arange(len(data.image_ids))
        self.validation = (torch.from_numpy(np.array(self.arrays.val_betas)),
                           torch.from_numpy(self.arrays.val_targets[held_out].astype(np.float32)))  # fmt: skip
        self.ended = False

    def advance(self, until: int) -> dict[str, float]:
        """Train up to an epoch, or to the end; the metrics of the best epoch so far."""
        scale, context = self.arrays.scale, self.context
        context.until = until
        if not self.ended:
            try:
                result = train(self.network, self.batches, self.validation, context, target_mean=scale["latents_mean"],
                               target_std=scale["latents_std"], **self.settings)  # fmt: skip
                self.ended = True
            except _Paused:
                result = {"state": context.saved["best"], **context.saved}
            self.best, self.history = result["state"], result["history"]
            self.metrics = self.history[result["best_epoch"]]
        return self.metrics

    def predictions(self) -> np.ndarray:
        """The best epoch's raw predictions for all validation images, (n, n_targets)."""
        current = {name: value.clone() for name, value in self.network.state_dict().items()}
        self.network.load_state_dict(self.best)
        scale = self.arrays.scale
        raw = predict(self.network, self.validation[0], scale["latents_mean"], scale["latents_std"]).numpy()
        self.network.load_state_dict(current)
        return raw


def score_pictures(
    plan: Plan, vdvae: VDVAE, data: SubjectData, arrays: TrainingArrays, raw: np.ndarray, n_layers: int
) -> dict[str, float]:
    """SSIM and PixCorr of the stage-1 pictures of predicted latents (n, n_targets), and the seconds a picture took.

    Layers that are not predicted are drawn with fixed seeds, so depths differ in nothing else.
    """
    config, seen = plan.config, ray.get(data.seen)
    scaled = rescale(raw, *moments(raw), arrays.scale["latents_mean"], arrays.scale["latents_std"])[: len(seen)]
    cells, start = [], 0
    for shape in plan.shapes("vdvae")[:n_layers]:
        size = int(np.prod(shape))
        cells.append(scaled[:, start : start + size].reshape(len(seen), *shape))
        start += size
    started, s = time.perf_counter(), config.stage1
    device = next(vdvae.parameters()).device
    share = memory_share(device.type, config.search.gpus_per_trial)
    batch_size = config.targets.batch_size or fitting_batch_size(vdvae_bytes(vdvae.config), share)
    with precision(device.type, config.targets.dtype):
        pictures = decode_pictures(vdvae, cells, data.image_ids[: len(seen)], s.seed, s.temperature, s.deterministic, batch_size)
    seconds = (time.perf_counter() - started) / len(seen)
    suite = config.evaluation.suites[0]
    found = dict(pixel_scores(suite, seen, enlarge(pictures, seen.shape[1:3])))
    scores = {name: float(found[f"{suite}/{name}"].mean()) for name in SCORED}
    return scores | {"score": sum(scores.values()) / len(SCORED), "decode_s": seconds}


def rungs(grace: int, reduction: int, n_epochs: int) -> list[int]:
    """Epochs after which a trial is scored and may be stopped: grace, grace x reduction, …, n_epochs."""
    found, epoch = [], grace
    while epoch < n_epochs:
        found.append(epoch)
        epoch *= reduction
    return [*found, n_epochs]


def run_trial(space: Space, plan: Plan, data: list[SubjectData]) -> None:
    """Train all subjects from rung to rung and report their mean; a trial that cannot go on says why, and the search goes
    on."""
    settings = plan.config.search
    torch.set_num_threads(max(1, int(settings.cpus_per_trial)))
    epoch = 0
    try:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        vdvae = load_vdvae(plan.vdvae_checkpoint, VDVAE_CONFIGS[plan.config.targets.vdvae](), device)
        saved = load_trial()
        seconds = saved.get("seconds", 0.0)
        trainings = [SubjectTraining(plan, own, space, device, saved.get(own.subject.subject)) for own in data]
        for epoch in rungs(settings.grace_epochs, settings.reduction, getattr(plan.config, space["model"]).n_epochs):
            if epoch <= saved.get("epoch", 0):
                continue
            started = time.perf_counter()
            metrics = [training.advance(epoch) for training in trainings]
            seconds += time.perf_counter() - started
            scores = [score_pictures(plan, vdvae, t.data, t.arrays, t.predictions(), space["n_layers"]) for t in trainings]
            summary = {name: float(np.mean([own[name] for own in scores])) for name in scores[0]}
            summary |= {f"score_{t.data.subject.subject}": own["score"] for t, own in zip(trainings, scores)}
            summary |= {f"n_parameters_{t.data.subject.subject}": float(t.n_parameters) for t in trainings}
            summary |= {name: float(np.mean([own[name] for own in metrics])) for name in ("val_mse", "val_mae")}
            summary |= {"n_parameters": float(np.mean([t.n_parameters for t in trainings])), "train_s": seconds / len(data)}
            states = {t.data.subject.subject: t.context.saved for t in trainings} | {"seconds": seconds, "epoch": epoch}
            report_trial(summary | {"epoch": epoch, "status": "trained"}, states)
            if all(training.ended for training in trainings):
                return
    except (DivergedError, TooLargeError) as error:
        tune.report({"score": FAILED, "epoch": epoch, "status": f"{type(error).__name__.removesuffix('Error')}: {error}"})


def report_trial(metrics: dict[str, Any], states: dict) -> None:
    """Hand metrics and everything that is needed to go on to Tune."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save(states, Path(folder) / "states.pt")
        tune.report(metrics, checkpoint=tune.Checkpoint.from_directory(folder))


def load_trial() -> dict:
    """What `report_trial` kept of this trial before it was interrupted; empty if nothing."""
    checkpoint = tune.get_checkpoint()
    if checkpoint is None:
        return {}
    with checkpoint.as_directory() as folder:
        return torch.load(Path(folder) / "states.pt", map_location="cpu", weights_only=True)


@ray.remote(num_cpus=1)
def score_ridge(plan: Plan, data: SubjectData, seen: np.ndarray) -> list[dict[str, Any]]:
    """Ridge as a reference: one factorisation for all depths, scored as the trials are."""
    vdvae = load_vdvae(plan.vdvae_checkpoint, VDVAE_CONFIGS[plan.config.targets.vdvae]())
    depths, rows = sorted(plan.config.search.n_layers), []
    arrays = data.arrays.get([layer_name(i) for i in range(depths[-1])])
    started = time.perf_counter()
    factor = factorise(np.array(arrays.betas), plan.config.ridge.alpha)
    smoother = factor.smoother(arrays.val_betas)
    shared = time.perf_counter() - started
    for n_layers in depths:
        own = data.arrays.get([layer_name(i) for i in range(n_layers)])
        started = time.perf_counter()
        mean = own.scale["latents_mean"]
        centred = (x.astype(np.float32) - x.mean(0, dtype=np.float32) for x in own.targets.arrays)
        raw = np.concatenate([smoother @ x for x in centred], 1) + mean
        seconds = shared + time.perf_counter() - started
        error = raw - own.val_targets[np.arange(len(raw))]
        rows.append({"model": "ridge", "n_layers": n_layers, "subject": data.subject.subject, "train_s": seconds,
                     "n_parameters": float(arrays.betas.shape[1] * raw.shape[1]), "val_mse": float(np.square(error).mean()),
                     "val_mae": float(np.abs(error).mean())} | score_pictures(plan, vdvae, data, own, raw, n_layers))  # fmt: skip
    return rows


class TrialLogger(tune.Callback):
    """Every trial as an MLflow run under the search's, figures for Prometheus, and a progress bar."""

    def __init__(self, tracker: Any, parent: str, n_trials: int):
        self.tracker, self.parent, self.progress, self.n_trials, self.best = tracker, parent, None, n_trials, FAILED

    def __getstate__(self) -> dict[str, Any]:
        """Tune keeps its callbacks in the search's folder; an actor and a bar do not outlive their process."""
        return vars(self) | {"tracker": None, "progress": None}

    def setup(self, *_: Any, **__: Any) -> None:
        self.progress = tqdm(total=self.n_trials, desc="search", unit="trial")
        self.record_trials([])

    def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict, **_: Any) -> None:
        log_trial(self.tracker, self.parent, trial.trial_id, trial.config, result)
        self.best = max(self.best, result["score"])
        self.progress.set_postfix(best=f"{self.best:.3f}", refresh=False)
        record("nsdray_search_best_score", self.best, search=self.parent.removeprefix("searches/"))
        self.record_trials(trials)

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **_: Any) -> None:
        self.progress.n = sum(other.is_finished() for other in trials)
        self.progress.refresh()
        self.record_trials(trials)
        status = (trial.last_result or {}).get("status", "")
        if not status.startswith("trained"):
            tqdm.write(f"  trial {trial.config}: {status}")

    def record_trials(self, trials: list) -> None:
        """Tell Prometheus how many trials there are."""
        finished, running = sum(t.is_finished() for t in trials), sum(t.status == "RUNNING" for t in trials)
        states = {"pending": self.n_trials - finished - running, "running": running, "finished": finished}
        for state, n in states.items():
            record("nsdray_search_trials", n, search=self.parent.removeprefix("searches/"), state=state)

    def on_experiment_end(self, trials: list, **_: Any) -> None:
        self.record_trials(trials)
        self.progress.close()


def log_trial(tracker: Any, parent: str, trial_id: str, space: dict, result: dict[str, Any], once: bool = False) -> None:
    """A trial's figures at one of its rungs, to its MLflow run. once: unless they are there."""
    key = f"{parent}/{trial_id}"
    tracker.start.remote(key, f"{space['model']}-{space['n_layers']}", space, {"kind": "trial"}, parent)
    scores = {name: float(value) for name, value in result.items() if is_column(name)}
    tracker.log_result.remote(key, scores, {"status": result["status"][:400]}, {}, result["epoch"], once)


COLUMNS = ("score", *SCORED, "val_mse", "val_mae", "n_parameters", "train_s", "decode_s", "epoch")
"""Of the table, and score and n_parameters of each subject, e.g. score_5."""


def is_column(name: str) -> bool:
    return name in COLUMNS or name.startswith(("score_", "n_parameters_"))


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


def hidden_units(config: Config, model: str, width: float) -> int:
    """A network's hidden units at a width: an even number."""
    return max(2, 2 * round(getattr(config, model).hidden * width / 2))


def trial(choice: dict[str, Any], plan: Plan, data: list[SubjectData]) -> None:
    """`run_trial` of a choice."""
    run_trial(choice | {"hidden": hidden_units(plan.config, choice["model"], choice["width"])}, plan, data)


def claim_folder(store: Store, folder: str, space: dict[str, Any]) -> None:
    """Write space.json, or check that the one that is there is ours."""
    text = json.dumps(space, indent=1, sort_keys=True)
    if "space.json" not in store.sizes(folder):
        store.write_bytes(f"{folder}/space.json", text.encode())
    found = json.loads(store.read_bytes(f"{folder}/space.json"))
    if found != json.loads(text):
        differing = sorted(k for k in found.keys() | space.keys() if found.get(k) != json.loads(text).get(k))
        raise ValueError(
            f"{store.uri(folder)} was made by another search (it differs in {', '.join(differing)}). Choose another "
            "--search.name, or move that folder away"
        )


def run_search(plan: Plan, folder: str, tracker: Any) -> pd.DataFrame:
    """Do or finish the search in a folder of the store; a row per trial, and per ridge reference."""
    config = plan.config
    settings = {"search": asdict(config.search), "samples": plan.samples.hash, "targets": plan.targets().hash,
                "subjects": {s.folder: s.inputs for s in plan.subjects}, "seed": config.seed, "stage1": asdict(config.stage1),
                "networks": {name: asdict(getattr(config, name)) for name in config.search.models}}  # fmt: skip
    claim_folder(plan.store, folder, settings)
    data = [share_subject(subject) for subject in plan.subjects]
    refs = [ref for own in data for ref in (own.seen, own.arrays.fixed, *own.arrays.columns.values())]
    ray.wait(refs, num_returns=len(refs))  # before trials hold the CPUs that reading needs
    reference = ray.get([score_ridge.remote(plan, own, own.seen) for own in data])
    trials = fit_trials(plan, folder, data, tracker)
    for result in trials:  # an earlier job may have ended before MLflow had them
        if result.metrics and "status" in result.metrics:
            log_trial(tracker, folder, result.metrics["trial_id"], result.config, result.metrics, once=True)
    table = [trial_row(config, result) for result in trials]
    by_depth = pd.DataFrame([row for rows in reference for row in rows])
    for n_layers, rows in by_depth.groupby("n_layers"):
        own = {f"score_{int(row.subject)}": row.score for row in rows.itertuples()}
        own |= {f"n_parameters_{int(row.subject)}": row.n_parameters for row in rows.itertuples()}
        table.append({"model": "ridge", "n_layers": n_layers, "status": "reference", **own}
                     | rows[[c for c in COLUMNS if c in rows]].mean().to_dict())  # fmt: skip
    return pd.DataFrame(table)


def fit_trials(plan: Plan, folder: str, data: list[SubjectData], tracker: Any) -> tune.ResultGrid:
    """Start Tune, or go on with what a search left in its folder."""
    config, search = plan.config, plan.config.search
    space, first = choices(config)
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")  # trials checkpoint often
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    gpus = {"gpu": search.gpus_per_trial} if ray.cluster_resources().get("GPU", 0) else {}
    function = tune.with_parameters(trial, plan=plan, data=data)
    trainable = tune.with_resources(function, {"cpu": search.cpus_per_trial} | gpus)
    storage, name = plan.store.uri(folder), "trials"
    callbacks = [TrialLogger(tracker, folder, search.n_trials)]
    if tune.Tuner.can_restore(f"{storage}/{name}"):
        tuner = tune.Tuner.restore(f"{storage}/{name}", trainable, resume_unfinished=True, resume_errored=True)
        tuner._local_tuner._run_config.callbacks = callbacks  # those that were kept point at the old tracker
        return tuner.fit()
    n_epochs = max(getattr(config, model).n_epochs for model in search.models)
    tune_config = tune.TuneConfig(
        metric="score", mode="max", num_samples=search.n_trials,
        search_alg=OptunaSearch(seed=config.seed, points_to_evaluate=first),
        scheduler=ASHAScheduler(time_attr="epoch", max_t=n_epochs, grace_period=min(search.grace_epochs, n_epochs),
                                reduction_factor=search.reduction),
    )  # fmt: skip
    run_config = tune.RunConfig(name=name, storage_path=storage, verbose=0, callbacks=callbacks,
                                checkpoint_config=tune.CheckpointConfig(num_to_keep=1),
                                failure_config=tune.FailureConfig(max_failures=config.cluster.max_retries))  # fmt: skip
    return tune.Tuner(trainable, param_space=space, tune_config=tune_config, run_config=run_config).fit()


def trial_row(config: Config, result: Any) -> dict[str, Any]:
    """A trial's choice and its last figures."""
    metrics = result.metrics or {}
    row = {name: value for name, value in metrics.items() if is_column(name)}
    hidden = hidden_units(config, result.config["model"], result.config["width"])
    status = metrics.get("status", f"failed: {result.error}")
    return dict(result.config) | {"hidden": hidden, "score": FAILED} | row | {"status": status}


def prepare_search(plan: Plan) -> None:
    """Betas and latents, as for any run."""
    with checked(plan, ("betas", "stimuli", "captions", "checkpoints")):
        run.prepare_betas(plan)
        run.extract_targets(plan)
