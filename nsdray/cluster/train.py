"""Networks trained by Ray Train over Ray Data streams. The loop itself is `nsdray.training`.

`TorchTrainer.fit` blocks, so each subject's runs in a thread of the driver and Ray fills the cluster. A run is named by
its model's hash: started again, Ray Train finds its last checkpoint and goes on. Its final figures come from the worker's
return value, not from ``fit().metrics``, which Train V2 binds to the last report with a checkpoint.
"""
from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import ray
import ray.train
import ray.train.torch
import torch
from ray.train import (
    Checkpoint,
    CheckpointConfig,
    FailureConfig,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
    UserCallback,
    WorkerGroupError,
)
from ray.train.backend import Backend
from safetensors.torch import save
from tqdm import tqdm

from nsdray.cluster.data import Source, TrainingStream, steps_per_epoch
from nsdray.cluster.metrics import record
from nsdray.cluster.ridge import decoder_card, finish_decoder
from nsdray.config import ClusterConfig, digest
from nsdray.decoder import Decoder, Scaling
from nsdray.regressors import REGRESSORS
from nsdray.regressors.scaling import Moments, moments
from nsdray.regressors.shared import SharedRegressor, is_trunk, pack, subject_state, with_trunk
from nsdray.seeds import derive
from nsdray.stages import Fit, Plan, SubjectPlan
from nsdray.store import Store, is_out_of_space, out_of_space
from nsdray.training import (
    Context,
    DivergedError,
    TooLargeError,
    count_parameters,
    free_memory,
    predict,
    require_memory,
    train,
)


class RayContext:
    """`nsdray.training.Context` of a Ray Train worker."""

    def __init__(self) -> None:
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()

    def prepare(self, model: torch.nn.Module) -> torch.nn.Module:
        # Batch statistics stay each worker's own; `train` averages them.
        return ray.train.torch.prepare_model(model, parallel_strategy_kwargs={"broadcast_buffers": False})

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


class LoneWorker(ray.train.torch.TorchConfig):
    """For one worker, which needs no process group: PyTorch's rendezvous listens on every interface and asks for no password."""

    @property
    def backend_cls(self) -> type[Backend]:
        return Backend


class CurveLogger(UserCallback):
    """Sends every epoch's metrics to the tracker and to Prometheus, from Ray Train's controller."""

    def __init__(self, tracker: Any, keys: list[str], labels: dict[str, str]):
        self.tracker, self.keys, self.labels = tracker, keys, labels

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None) -> None:
        for key in self.keys:
            self.tracker.log_epoch.remote(key, metrics[0])
        record("nsdray_epoch", metrics[0]["epoch"] + 1, **self.labels)
        record("nsdray_train_loss", metrics[0]["train_loss"], **self.labels)
        record("nsdray_validation_loss", metrics[0]["val_loss"], **self.labels)
        record("nsdray_training_images_per_second", metrics[0]["samples_per_s"], **self.labels)


def validation_images(subject: SubjectPlan, fraction: float) -> np.ndarray:
    """Training images kept for validation: those with the smallest hash of (seed, image_id)."""
    ids = subject.image_ids("train")
    order = np.argsort([derive(subject.plan.config.seed, "validation", int(i)) for i in ids], kind="stable")
    return np.sort(ids[order[: max(2, round(fraction * len(ids)))]])


def train_worker(arguments: dict[str, Any]) -> dict[str, float] | ValueError:
    """What one Ray Train worker does: fit the network; the first one writes the decoders.

    What only the user can mend is returned, not raised: all workers find it at once, and Ray Train would try the same again.
    """
    try:
        return fit_network(arguments["subjects"], arguments["fit"], RayContext())
    except (DivergedError, TooLargeError) as error:
        return error
    except ValueError as error:
        return ValueError(str(getattr(error, "cause", error)))  # without Ray's wrapping, if a task raised it


def agreed(context: Context, work: Callable[[], Any]) -> Any:
    """What work gives. A ValueError of one worker is one for all, since they would wait for that one for ever."""
    result, error = None, None
    try:
        result = work()
    except ValueError as own:
        error = own
    failed = torch.zeros(context.world_size, device=context.device)
    failed[context.rank] = error is not None
    failed = context.sum(failed)
    if error is not None:
        raise error
    if failed.any():
        raise ValueError(f"training worker {int(failed.argmax()) + 1} of {context.world_size} could not start; its log says why")
    return result


def least_memory(context: Context) -> int:
    """Bytes that are free where the least are free of all workers."""
    free = torch.zeros(context.world_size, dtype=torch.float64, device=context.device)
    free[context.rank] = free_memory(context.device)
    return int(context.sum(free).min())


def fit_network(subjects: list[SubjectPlan], fit: Fit, context: Context) -> dict[str, float]:
    """Fit one network to all of these subjects; the first worker writes their decoders. The metrics of its best epoch."""
    plan, config = subjects[0].plan, subjects[0].plan.config
    settings, sizes = config.settings(fit.regressor), getattr(config, fit.network).sizes()
    held_out = [validation_images(subject, settings["validation_fraction"]) for subject in subjects]
    sources = [Source.of(subject, "train", plan.columns(fit.kind), fit.kind) for subject in subjects]
    n_rows = [sum(len(part.image_ids) for part in source.parts) - len(ids) for source, ids in zip(sources, held_out)]
    n_steps = steps_per_epoch(n_rows, settings["batch_size"], context.world_size)
    n_voxels, n_targets = [len(subject.voxels.index) for subject in subjects], sum(math.prod(s) for s in plan.shapes(fit.kind))
    n_parameters = count_parameters(partial(build, fit, n_voxels, n_targets, sizes))
    n_rows_step = -(-sum(n_rows) // (n_steps * context.world_size))
    require_memory(n_parameters, max(n_voxels), n_targets, n_rows_step, sum(map(len, held_out)), least_memory(context))

    scans = agreed(context, lambda: [scan(source, ids) for source, ids in zip(sources, held_out)])
    scales = [(torch.from_numpy(own.betas.mean), torch.from_numpy(own.betas.std)) for own in scans]
    val_betas = [standardise(own.val_betas, scale) for own, scale in zip(scans, scales)]
    torch.manual_seed(derive(config.seed, "initial weights", *(subject.subject for subject in subjects)))
    network = build(fit, n_voxels, n_targets, sizes)
    latents_mean, latents_std = target_moments(scans)
    rate_factor = None
    if (folder := plan.pretrained(fit)) is not None:
        base = agreed(context, lambda: pretrained_decoder(plan, fit, folder, sizes))
        latents_mean, latents_std = base.scaling.latents_mean, base.scaling.latents_std  # what the trunk's outputs mean
        network = with_trunk(network, base.network.state_dict())
        rate_factor = partial(trunk_rate, network, settings["trunk_rate"])
    streams = [TrainingStream(source, ids, n_steps, settings["n_epochs"], config.seed, context.rank, context.world_size,
                              settings["sampling"]) for source, ids in zip(sources, held_out)]  # fmt: skip
    share = slice(context.rank, None, context.world_size)
    validation = join(fit, [x[share] for x in val_betas]), torch.cat([own.val_latents[share] for own in scans])
    names = ("n_epochs", "learning_rate", "weight_decay", "patience", "warmup_epochs", "clip_norm", "checkpoint_every")
    result = train(
        network, partial(joint_batches, fit, streams, scales), validation, context, seed=config.seed,
        target_mean=latents_mean, target_std=latents_std, rate_factor=rate_factor, **{name: settings[name] for name in names},
    )  # fmt: skip
    if context.rank == 0:
        for place, (subject, betas, scale) in enumerate(zip(subjects, val_betas, scales)):
            layer = REGRESSORS[fit.network].INPUT
            state = subject_state(result["state"], place, layer) if fit.is_shared else result["state"]
            own = REGRESSORS[fit.network](n_voxels[place], n_targets, **sizes)
            own.load_state_dict(state)
            held_out_moments = moments(predict(own, betas, latents_mean, latents_std).numpy())
            scaling = Scaling(subject.voxels.index, *(x.numpy() for x in scale), latents_mean, latents_std, *held_out_moments)
            write_network(subject, fit, state, result["history"], scaling)
    return result["history"][result["best_epoch"]] | {"n_epochs_run": len(result["history"])}


def build(fit: Fit, n_voxels: list[int], n_targets: int, sizes: dict[str, Any]) -> torch.nn.Module:
    """The network of a fit, plain for one subject or shared by several."""
    network = REGRESSORS[fit.network]
    return SharedRegressor(network, n_voxels, n_targets, **sizes) if fit.is_shared else network(*n_voxels, n_targets, **sizes)


def join(fit: Fit, betas: list[torch.Tensor]) -> torch.Tensor:
    """Subjects' z-scored betas as the network wants them."""
    return pack(betas) if fit.is_shared else betas[0]


def joint_batches(fit: Fit, streams: list[TrainingStream], scales: list, epoch: int):
    """The batches of an epoch (`nsdray.training.Batches`): of each subject its share in every step."""
    for steps in zip(*(stream(epoch) for stream in streams)):
        betas = [standardise(raw, scale) for (raw, _, _), scale in zip(steps, scales)]
        yield join(fit, betas), torch.cat([targets for _, targets, _ in steps]), sum(n for *_, n in steps)


def trunk_rate(network: torch.nn.Module, rate: float, name: str) -> float:
    """Factor on a parameter's learning rate in fine-tuning."""
    return rate if is_trunk(network, name) else 1.0


def pretrained_decoder(plan: Plan, fit: Fit, folder: Path, sizes: dict[str, Any]) -> Decoder:
    """The decoder to fine-tune. ValueError if it predicts something else, or by another network."""
    decoder = Decoder.load(folder)
    source = plan.config.targets.vdvae if fit.kind == "vdvae" else plan.config.clip.model
    wanted = {"regressor": fit.network, "kind": fit.kind, "columns": plan.columns(fit.kind), "network": sizes, "source": source}
    for name, value in wanted.items():
        found = getattr(decoder.card, name)
        if found != value:
            raise ValueError(f"{folder} cannot be fine-tuned to this: its {name} is {found}, wanted {value}")
    return decoder


def write_network(subject: SubjectPlan, fit: Fit, state: dict[str, torch.Tensor], history: list, scaling: Scaling) -> None:
    """Write a subject's decoder, and mark it as finished."""
    plan, stage, settings = subject.plan, subject.plan.model(fit), getattr(subject.plan.config, fit.network)
    folder = f"{stage.folder}/{subject.folder}"
    weights = save({name: value.contiguous() for name, value in state.items()})
    plan.store.write_bytes(f"{folder}/network.safetensors", weights)
    plan.store.write_bytes(f"{folder}/history.json", json.dumps(history, indent=1).encode())
    finish_decoder(subject, stage, decoder_card(subject, fit, settings.rescale, settings.sizes()), scaling)


class Scan(NamedTuple):
    """What one pass over a subject's training parts gives."""

    betas: Moments
    """Of the images that are fitted to."""
    latents: Moments
    val_betas: torch.Tensor
    """Of the held-out images, float32, percent signal change."""
    val_latents: torch.Tensor


def scan(source: Source, held_out: np.ndarray) -> Scan:
    """One pass over the training parts."""
    betas_moments, latents_moments, val_betas, val_latents = Moments(), Moments(), [], []
    for index in range(len(source.parts)):
        image_ids, betas, latents = source.read(index)
        is_held_out = np.isin(image_ids, held_out)
        betas_moments.add(betas[~is_held_out])
        latents_moments.add(latents[~is_held_out])
        val_betas.append(betas[is_held_out])
        val_latents.append(latents[is_held_out].astype(np.float32))
    held_out_rows = (torch.from_numpy(np.concatenate(rows)) for rows in (val_betas, val_latents))
    return Scan(betas_moments, latents_moments, *held_out_rows)


def target_moments(scans: list[Scan]) -> tuple[np.ndarray, np.ndarray]:
    """Moments of all subjects' targets together, each (n_targets,)."""
    together = Moments()
    for own in scans:
        together.merge(own.latents)
    return together.mean, together.std


def standardise(betas: torch.Tensor, scale: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """`zscore` for tensors, by (mean, std): 0 where std is 0."""
    mean, std = scale
    return (betas - mean) * torch.where(std > 0, 1 / std.clamp_min(1e-30), 0)


def train_networks(subjects: list[SubjectPlan], fit: Fit, tracker: Any) -> None:
    """Train one network per subject, as many at a time as the cluster has room for, or one for all subjects of the plan if it
    is shared, and write their decoders."""
    if not subjects:
        return
    teams = [subjects[0].plan.subjects] if fit.is_shared else [[subject] for subject in subjects]
    # The controller takes one report per poll; at its default of 2 s, an epoch could not be shorter than that.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")
    at_once = parallel_trainings(subjects[0].plan.config.cluster, ray.cluster_resources())
    threads, label = ThreadPoolExecutor(at_once), subjects[0].plan.label(fit)
    try:
        running = {threads.submit(_fit, team, fit, tracker): team for team in teams}
        with tqdm(total=len(running), desc=f"train {label} ({at_once} at a time)", unit="network") as progress:
            for done in as_completed(running):
                best = done.result()
                progress.update()
                who = ", ".join(str(subject.subject) for subject in running[done])
                tqdm.write(
                    f"  subject {who}: {label} stopped after {best['n_epochs_run']} epochs, best epoch "
                    f"{best['epoch'] + 1}, validation MSE {best['val_mse']:.4f}, MAE {best['val_mae']:.4f}"
                )
    finally:
        threads.shutdown(wait=False, cancel_futures=True)


def _fit(subjects: list[SubjectPlan], fit: Fit, tracker: Any) -> dict[str, float]:
    plan, cluster = subjects[0].plan, subjects[0].plan.config.cluster
    who, folder = ("all", "all") if fit.is_shared else (str(subjects[0].subject), subjects[0].folder)
    name = f"{plan.model(fit).folder}/{folder}-{digest([subject.inputs for subject in subjects])}".replace("/", "_")
    keys = [subject.run_key(fit.regressor) for subject in subjects] if tracker and fit.kind == "vdvae" else []  # or history.json
    n_gpus = 1 if ray.cluster_resources().get("GPU", 0) else 0
    storage_path, storage_filesystem = plan.store.storage("training")
    trainer = ray.train.torch.TorchTrainer(
        train_worker,
        train_loop_config={"subjects": subjects, "fit": fit},
        torch_config=None if cluster.n_train_workers > 1 else LoneWorker(),
        scaling_config=ScalingConfig(
            num_workers=cluster.n_train_workers, use_gpu=bool(n_gpus),
            resources_per_worker={"CPU": cluster.cpus_per_train_worker} | ({"GPU": 1} if n_gpus else {}),
        ),
        run_config=RunConfig(
            name=name,
            storage_path=storage_path,
            storage_filesystem=storage_filesystem,
            failure_config=FailureConfig(max_failures=cluster.max_retries),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            callbacks=[CurveLogger(tracker, keys, {"model": plan.label(fit), "subject": who})],
        ),
    )  # fmt: skip
    forget_broken_run(plan.store, f"training/{name}")
    try:
        result = trainer.fit().return_value
    except TrainingFailedError as error:
        raise cause_of(error, plan.store.path(f"training/{name}")) from error
    if isinstance(result, ValueError):
        raise type(result)(f"{plan.label(fit)}, subject {', '.join(str(s.subject) for s in subjects)}: {result}")
    return result


def cause_of(error: TrainingFailedError, folder: str) -> BaseException:
    """What went wrong in a worker or in Ray Train's controller, without Ray Train's wrapping; a full disk above all else."""
    causes = [getattr(error, "controller_failure", error)]
    if isinstance(error, WorkerGroupError):
        causes = [getattr(failure, "_base_exc", failure) for failure in error.worker_failures.values()] or causes
    full = next((cause for cause in causes if is_out_of_space(cause)), None)
    return causes[0] if full is None else out_of_space(folder)


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
