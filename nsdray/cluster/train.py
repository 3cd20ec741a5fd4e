"""Networks trained by Ray Train over Ray Data streams. The loop itself is `nsdray.training`.

`TorchTrainer.fit` blocks, so each subject's runs in a thread of the driver and Ray fills the cluster. A run is named by
its model's hash: started again, Ray Train finds its last checkpoint and goes on. Its final figures come from the worker's
return value, not from ``fit().metrics``, which Train V2 binds to the last report with a checkpoint.
"""
from __future__ import annotations

import json
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
import ray.train.torch
import torch
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, UserCallback, WorkerGroupError
from safetensors.torch import save
from tqdm import tqdm

from nsdray.cluster.data import Source, TrainingStream
from nsdray.cluster.ridge import decoder_card, finish_decoder
from nsdray.config import ClusterConfig, digest
from nsdray.decoder import Scaling
from nsdray.regressors import REGRESSORS
from nsdray.regressors.scaling import Moments, moments, zscore
from nsdray.seeds import derive
from nsdray.stages import Fit, SubjectPlan
from nsdray.store import Store
from nsdray.training import predict, train


class RayContext:
    """`nsdray.training.Context` of a Ray Train worker."""

    def __init__(self) -> None:
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()

    def prepare(self, model: torch.nn.Module) -> torch.nn.Module:
        return ray.train.torch.prepare_model(model)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        if self.world_size > 1:
            torch.distributed.all_reduce(values)
        return values

    def report(self, metrics: dict[str, float], checkpoint: dict | None) -> None:
        with tempfile.TemporaryDirectory() as folder:
            saved = None
            if checkpoint is not None and self.rank == 0:
                torch.save(checkpoint, Path(folder) / "state.pt")
                saved = Checkpoint.from_directory(folder)
            ray.train.report(metrics, checkpoint=saved)

    def resume(self) -> dict | None:
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return None
        with checkpoint.as_directory() as folder:
            return torch.load(Path(folder) / "state.pt", map_location="cpu", weights_only=True)


class CurveLogger(UserCallback):
    """Sends every epoch's metrics to the tracker, from Ray Train's controller."""

    def __init__(self, tracker: Any, key: str):
        self.tracker, self.key = tracker, key

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None) -> None:
        self.tracker.log_epoch.remote(self.key, metrics[0])


def validation_images(subject: SubjectPlan, fraction: float) -> np.ndarray:
    """Training images kept for validation: those with the smallest hash of (seed, image_id)."""
    ids = subject.image_ids("train")
    order = np.argsort([derive(subject.plan.config.seed, "validation", int(i)) for i in ids], kind="stable")
    return np.sort(ids[order[: max(2, round(fraction * len(ids)))]])


def train_worker(arguments: dict[str, Any]) -> dict[str, float]:
    """What one Ray Train worker does: fit the network; the first one writes the decoder."""
    subject, fit = arguments["subject"], arguments["fit"]
    config, settings = subject.plan.config, subject.plan.config.settings(fit.regressor)
    context = RayContext()
    held_out = validation_images(subject, settings["validation_fraction"])
    source = Source.of(subject, "train", subject.plan.columns(fit.kind), fit.kind)
    betas_moments, latents_moments, val_betas, val_latents = scan(source, held_out)
    (betas_mean, betas_std), (latents_mean, latents_std) = ((m.mean, m.std) for m in (betas_moments, latents_moments))
    val_betas, val_latents = torch.from_numpy(zscore(val_betas, betas_mean, betas_std)), torch.from_numpy(val_latents)

    torch.manual_seed(derive(config.seed, "initial weights", subject.subject))
    network_arguments = {name: settings[name] for name in ("hidden", "dropout")}
    network = REGRESSORS[fit.regressor](len(betas_mean), len(latents_mean), **network_arguments)
    stream = TrainingStream(source, held_out, settings["batch_size"], settings["n_epochs"],
                            config.seed, context.rank, context.world_size)  # fmt: skip
    scale = torch.from_numpy(betas_mean), torch.from_numpy(betas_std)

    def batches(epoch: int):
        for raw_betas, raw_targets, n_global in stream(epoch):
            yield standardise(raw_betas, *scale), raw_targets, n_global

    share = slice(context.rank, None, context.world_size)
    names = ("n_epochs", "learning_rate", "weight_decay", "patience", "warmup_epochs", "clip_norm", "checkpoint_every")
    result = train(
        network, batches, (val_betas[share], val_latents[share]), context, seed=config.seed, target_mean=latents_mean,
        target_std=latents_std, **{name: settings[name] for name in names},
    )  # fmt: skip
    if context.rank == 0:
        network.load_state_dict(result["state"])
        predictions_mean, predictions_std = moments(predict(network, val_betas, latents_mean, latents_std).numpy())
        scaling = Scaling(subject.voxels.index, betas_mean, betas_std, latents_mean, latents_std, predictions_mean,
                          predictions_std)  # fmt: skip
        stage = subject.plan.model(fit)
        folder = f"{stage.folder}/{subject.folder}"
        weights = save({name: value.contiguous() for name, value in result["state"].items()})
        subject.plan.store.write_bytes(f"{folder}/network.safetensors", weights)
        subject.plan.store.write_bytes(f"{folder}/history.json", json.dumps(result["history"], indent=1).encode())
        finish_decoder(subject, stage, decoder_card(subject, fit, settings["rescale"], network_arguments), scaling)
    return result["history"][result["best_epoch"]] | {"n_epochs_run": len(result["history"])}


def scan(source: Source, held_out: np.ndarray) -> tuple[Moments, Moments, np.ndarray, np.ndarray]:
    """One pass over the training parts: moments of betas and latents of the images that are fitted to, and the held-out
    images' betas and latents, float32."""
    betas_moments, latents_moments, val_betas, val_latents = Moments(), Moments(), [], []
    for index in range(len(source.parts)):
        image_ids, betas, latents = source.read(index)
        is_held_out = np.isin(image_ids, held_out)
        betas_moments.add(betas[~is_held_out])
        latents_moments.add(latents[~is_held_out])
        val_betas.append(betas[is_held_out])
        val_latents.append(latents[is_held_out].astype(np.float32))
    return betas_moments, latents_moments, np.concatenate(val_betas), np.concatenate(val_latents)


def standardise(betas: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """`zscore` for tensors: 0 where std is 0."""
    return (betas - mean) * torch.where(std > 0, 1 / std.clamp_min(1e-30), 0)


def train_networks(subjects: list[SubjectPlan], fit: Fit, tracker: Any) -> None:
    """Train one network per subject, as many at a time as the cluster has room for, and write their decoders."""
    if not subjects:
        return
    # The controller takes one report per poll; at its default of 2 s, an epoch could not be shorter than that.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")
    at_once = parallel_trainings(subjects[0].plan.config.cluster, ray.cluster_resources())
    threads = ThreadPoolExecutor(at_once)
    try:
        running = {threads.submit(_fit, subject, fit, tracker): subject for subject in subjects}
        with tqdm(total=len(running), desc=f"train {fit.regressor} ({at_once} at a time)", unit="subject") as progress:
            for done in as_completed(running):
                best = done.result()
                progress.update()
                tqdm.write(
                    f"  subject {running[done].subject}: {fit.regressor} stopped after {best['n_epochs_run']} epochs, best epoch "
                    f"{best['epoch'] + 1}, validation MSE {best['val_mse']:.4f}, MAE {best['val_mae']:.4f}"
                )
    finally:
        threads.shutdown(wait=False, cancel_futures=True)


def _fit(subject: SubjectPlan, fit: Fit, tracker: Any) -> dict[str, float]:
    plan, cluster = subject.plan, subject.plan.config.cluster
    name = f"{plan.model(fit).folder}/{subject.folder}-{digest(subject.inputs)}".replace("/", "_")
    n_gpus = 1 if ray.cluster_resources().get("GPU", 0) else 0
    trainer = ray.train.torch.TorchTrainer(
        train_worker,
        train_loop_config={"subject": subject, "fit": fit},
        scaling_config=ScalingConfig(
            num_workers=cluster.n_train_workers, use_gpu=bool(n_gpus),
            resources_per_worker={"CPU": cluster.cpus_per_train_worker} | ({"GPU": 1} if n_gpus else {}),
        ),
        run_config=RunConfig(
            name=name,
            storage_path=plan.store.path("training"),
            storage_filesystem=None if plan.store.is_local else plan.store.fs,
            failure_config=FailureConfig(max_failures=cluster.max_retries),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            callbacks=[CurveLogger(tracker, subject.run_key(fit.regressor))],
        ),
    )  # fmt: skip
    forget_broken_run(plan.store, f"training/{name}")
    try:
        return trainer.fit().return_value
    except WorkerGroupError as error:  # tell what went wrong in the worker
        raise next(iter(error.worker_failures.values()), error) from error


def forget_broken_run(store: Store, folder: str) -> None:
    """Ray Train rewrites its snapshot in place, so a kill can leave half of one, and then it could never start again."""
    try:
        json.loads(store.read_bytes(f"{folder}/checkpoint_manager_snapshot.json"))
    except FileNotFoundError:
        pass
    except ValueError:
        store.fs.delete_dir(store.path(folder))


def parallel_trainings(cluster: ClusterConfig, available: dict[str, float]) -> int:
    """Trainings that fit at once. ValueError if not even one does."""
    cpus, gpus, n_workers = available.get("CPU", 0), available.get("GPU", 0), cluster.n_train_workers
    fits = int(cpus / (n_workers * cluster.cpus_per_train_worker))
    if gpus:
        fits = min(fits, int(gpus / n_workers))
    if fits < 1:
        raise ValueError(
            f"{n_workers} training workers need {n_workers * cluster.cpus_per_train_worker:g} CPUs"
            f"{f' and {n_workers} GPUs' if gpus else ''}, but the cluster has {cpus:g} CPUs and {gpus:g} GPUs; they would "
            "wait for ever. Lower --cluster.n-train-workers or --cluster.cpus-per-train-worker."
        )
    return fits
