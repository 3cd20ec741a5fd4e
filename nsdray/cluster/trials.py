"""One trial of a search: networks of all subjects, trained from rung to rung and scored by pictures; and ridge beside them.

Latent errors of different depths cannot be compared, so what counts is the mean of SSIM and PixCorr of the stage-1 pictures that
the validation images' predicted latents give. All trials of a node map one copy of the data (`share_arrays`).
"""
from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import ray
import torch
from ray import tune

from nsdray.cluster.actors import fitting_batch_size, memory_share, precision, vdvae_bytes
from nsdray.cluster.data import SharedArrays, Source, TrainingArrays, share_arrays
from nsdray.cluster.train import validation_images
from nsdray.config import Config, TrainingConfig
from nsdray.decoder import cut_columns
from nsdray.generators.stage1 import decode_pictures, enlarge
from nsdray.metrics.bootstrap import bootstrap
from nsdray.metrics.perceptual import pixel_scores
from nsdray.models.vdvae import VDVAE, load_vdvae
from nsdray.nsd.stimuli import Stimuli
from nsdray.regressors import REGRESSORS
from nsdray.regressors.ridge import factorise
from nsdray.regressors.scaling import moments, rescale
from nsdray.seeds import derive
from nsdray.stages import VDVAE_CONFIGS, Plan, SubjectPlan, layer_name
from nsdray.training import (
    DivergedError,
    LocalContext,
    TooLargeError,
    count_parameters,
    memory_batches,
    predict,
    require_memory,
    train,
)

FAILED = -1.0
"""Score of a trial that diverged or did not fit into memory: the worst that SSIM and PixCorr can be."""
SCORED = ("ssim", "pixcorr")
WHOLE = ("trained", "reference")
"""Status of what was trained to its end, and of ridge; a trial that ASHA stopped is "unfinished"."""
OWN = ("score", "n_parameters", "train_s", "decode_s")
"""Of which it also has each subject's own, as score_5: what fronts are drawn from."""
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


def training_settings(config: Config, model: str) -> TrainingConfig:
    """A network's own settings, with the search's number of epochs."""
    own = getattr(config, model)
    return own if config.search.n_epochs is None else replace(own, n_epochs=config.search.n_epochs)


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
    """One subject's network in a trial. saved: its `state` when the trial was interrupted."""

    def __init__(self, plan: Plan, data: SubjectData, space: Space, device: torch.device, saved: dict | None):
        settings = training_settings(plan.config, space["model"])
        self.data, self.layers = data, [layer_name(i) for i in range(space["n_layers"])]
        self.arrays = data.arrays.get(self.layers)
        seed = plan.config.seed
        torch.manual_seed(derive(seed, "initial weights", data.subject.subject))
        self.network = build(plan, data.subject, space).to(device)
        self.n_parameters = sum(parameter.numel() for parameter in self.network.parameters())
        self.context, self.seconds = PausingContext(device, saved=saved and saved["training"]), saved["seconds"] if saved else 0.0
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
        scale, context, started = self.arrays.scale, self.context, time.perf_counter()
        context.until = until
        if not self.ended:
            try:
                result = train(self.network, self.batches, self.validation, context, target_mean=scale["latents_mean"],
                               target_std=scale["latents_std"], **self.settings)  # fmt: skip
                self.ended = True
            except _Paused:
                result = {"state": context.saved["best"], **context.saved}
                n_epochs, best_epoch = len(result["history"]), result["best_epoch"]
                self.ended = n_epochs == self.settings["n_epochs"] or n_epochs - 1 - best_epoch >= self.settings["patience"]
            self.best, self.history = result["state"], result["history"]
            self.metrics = self.history[result["best_epoch"]]
            self.seconds += time.perf_counter() - started
        return self.metrics

    @property
    def state(self) -> dict[str, Any]:
        """What it takes to go on."""
        return {"training": self.context.saved, "seconds": self.seconds}

    def predictions(self) -> np.ndarray:
        """The best epoch's raw predictions for all validation images, (n, n_targets)."""
        current = {name: value.clone() for name, value in self.network.state_dict().items()}
        self.network.load_state_dict(self.best)
        scale = self.arrays.scale
        raw = predict(self.network, self.validation[0], scale["latents_mean"], scale["latents_std"]).numpy()
        self.network.load_state_dict(current)
        return raw

    def figures(self, plan: Plan, vdvae: VDVAE) -> dict[str, float]:
        """What the trial's table says of this subject."""
        started = time.perf_counter()
        raw = self.predictions()
        seconds = (time.perf_counter() - started) / len(raw)
        found = score_pictures(plan, vdvae, self.data, self.arrays, raw, len(self.layers))
        found |= {"decode_s": found["decode_s"] + seconds, "train_s": self.seconds, "epochs": len(self.history)}
        return found | {"n_parameters": self.n_parameters, "val_mse": self.metrics["val_mse"], "val_mae": self.metrics["val_mae"]}


def hidden_units(config: Config, model: str, width: float) -> int:
    """A network's hidden units at a width: an even number."""
    return max(2, 2 * round(getattr(config, model).hidden * width / 2))


def with_hidden(config: Config, choice: dict[str, Any]) -> Space:
    """A choice with its number of hidden units."""
    return choice | {"hidden": hidden_units(config, choice["model"], choice["width"])}


def build(plan: Plan, subject: SubjectPlan, space: Space) -> torch.nn.Module:
    """A subject's network in a trial."""
    sizes = getattr(plan.config, space["model"]).sizes() | {"hidden": space["hidden"], "dropout": space["dropout"]}
    return REGRESSORS[space["model"]](len(subject.voxels.index), n_targets(plan, space["n_layers"]), **sizes)


def n_targets(plan: Plan, n_layers: int) -> int:
    """Latents of the first n_layers."""
    return sum(int(np.prod(shape)) for shape in plan.shapes("vdvae")[:n_layers])


def require_trial_memory(plan: Plan, data: list[SubjectData], space: Space, memory: int) -> None:
    """`TooLargeError` if the networks of all subjects, trained in turns and kept side by side, want more than memory."""
    subjects, batch_size = [own.subject for own in data], getattr(plan.config, space["model"]).batch_size
    n_parameters = sum(count_parameters(partial(build, plan, subject, space)) for subject in subjects)
    n_voxels, n_validation = max(len(s.voxels.index) for s in subjects), sum(len(own.image_ids) for own in data)
    require_memory(n_parameters, n_voxels, n_targets(plan, space["n_layers"]), batch_size, n_validation, memory)


def score_pictures(
    plan: Plan, vdvae: VDVAE, data: SubjectData, arrays: TrainingArrays, raw: np.ndarray, n_layers: int
) -> dict[str, float]:
    """SSIM and PixCorr of the stage-1 pictures of predicted latents (n, n_targets), their mean ("score") with half its 95 %
    bootstrap interval over images ("score_error"), and the seconds a picture took.

    Layers that are not predicted are drawn with fixed seeds, so depths differ in nothing else.
    """
    config, seen = plan.config, ray.get(data.seen)
    scaled = rescale(raw, *moments(raw), arrays.scale["latents_mean"], arrays.scale["latents_std"])[: len(seen)]
    cells = cut_columns(scaled, plan.shapes("vdvae")[:n_layers])
    started, s = time.perf_counter(), config.stage1
    device = next(vdvae.parameters()).device
    share = memory_share(device.type, config.search.gpus_per_trial)
    batch_size = config.targets.batch_size or fitting_batch_size(vdvae_bytes(vdvae.config), share)
    with precision(device.type, config.targets.dtype):
        pictures = decode_pictures(vdvae, cells, data.image_ids[: len(seen)], s.seed, s.temperature, s.deterministic, batch_size)
    seconds = (time.perf_counter() - started) / len(seen)
    suite = config.evaluation.suites[0]
    found = dict(pixel_scores(suite, seen, enlarge(pictures, seen.shape[1:3])))
    values = {name: found[f"{suite}/{name}"] for name in SCORED}
    score = bootstrap(np.mean(list(values.values()), 0), config.evaluation.n_bootstrap, config.seed)
    return {name: float(own.mean()) for name, own in values.items()} | {
        "score": score.mean, "score_error": (score.high - score.low) / 2, "decode_s": seconds}  # fmt: skip


def summarise(figures: dict[int, dict[str, float]]) -> dict[str, float]:
    """Means over subjects, and what is OWN of each (as score_5). Subjects' images are others, so their errors are independent."""
    each = list(figures.values())
    means = {name: float(np.mean([own[name] for own in each])) for name in each[0]}
    means["score_error"] = float(np.sqrt(np.sum([own["score_error"] ** 2 for own in each]))) / len(each)
    return means | {f"{name}_{subject}": float(own[name]) for subject, own in figures.items() for name in OWN}


def rungs(grace: int, reduction: int, n_epochs: int) -> list[int]:
    """Epochs after which a trial is scored and may be stopped: grace, grace x reduction, …, n_epochs."""
    found, epoch = [], grace
    while epoch < n_epochs:
        found.append(epoch)
        epoch *= reduction
    return [*found, n_epochs]


def run_trial(space: Space, plan: Plan, data: list[SubjectData], memory: int) -> None:
    """Train all subjects from rung to rung and report their mean; a trial that cannot go on says why, and the search goes
    on. memory: bytes that it may take."""
    settings = plan.config.search
    torch.set_num_threads(max(1, int(settings.cpus_per_trial)))
    epoch = 0
    try:
        require_trial_memory(plan, data, space, memory)
        device = own_device()
        vdvae = load_vdvae(plan.vdvae_checkpoint, VDVAE_CONFIGS[plan.config.targets.vdvae](), device)
        saved = load_trial()
        numbers = [own.subject.subject for own in data]
        trainings = {n: SubjectTraining(plan, own, space, device, saved.get(n)) for n, own in zip(numbers, data)}
        n_epochs = training_settings(plan.config, space["model"]).n_epochs
        for epoch in rungs(settings.grace_epochs, settings.reduction, n_epochs):
            if epoch <= saved.get("epoch", 0):
                continue
            for training in trainings.values():
                training.advance(epoch)
            figures = {subject: training.figures(plan, vdvae) for subject, training in trainings.items()}
            ended = all(training.ended for training in trainings.values())
            states = {subject: training.state for subject, training in trainings.items()} | {"epoch": epoch}
            report_trial(summarise(figures) | {"epoch": epoch, "status": "trained" if ended else "unfinished"}, states)
            if ended:
                return
    except (DivergedError, TooLargeError) as error:
        tune.report({"score": FAILED, "epoch": epoch, "status": f"{type(error).__name__.removesuffix('Error')}: {error}"})
    except torch.OutOfMemoryError as error:
        tune.report({"score": FAILED, "epoch": epoch, "status": f"TooLarge: {error}"})


def own_device() -> torch.device:
    """The GPU that Ray gave to this process, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


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


@ray.remote
def score_ridge(plan: Plan, data: SubjectData, seen: np.ndarray) -> list[dict[str, float]]:
    """Ridge as a reference, with a trial's resources: one factorisation for all depths, scored as the trials are. Figures for
    each depth in ascending order."""
    torch.set_num_threads(max(1, int(plan.config.search.cpus_per_trial)))
    vdvae = load_vdvae(plan.vdvae_checkpoint, VDVAE_CONFIGS[plan.config.targets.vdvae](), own_device())
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
        seconds = time.perf_counter() - started
        error = raw - own.val_targets[np.arange(len(raw))]
        found = score_pictures(plan, vdvae, data, own, raw, n_layers)
        rows.append(found | {"decode_s": found["decode_s"] + seconds / len(raw), "train_s": shared,
                             "n_parameters": arrays.betas.shape[1] * raw.shape[1], "val_mse": float(np.square(error).mean()),
                             "val_mae": float(np.abs(error).mean())})  # fmt: skip
    return rows
