"""One training loop for every network: z-scored betas to standardised targets. Plain torch.

What a cluster adds (several workers, checkpoints that outlive a machine, tracking) comes in through a `Context`;
`LocalContext` is one process. Batches and dropout are keyed by (seed, epoch, rank), so a run resumed from a checkpoint
is bit-identical to one that was never disturbed.
"""
from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from nsdray import seeds as draws

Batches = Callable[[int], Iterable[tuple[torch.Tensor, torch.Tensor, int]]]
"""Epoch to this worker's batches: betas (b, n_voxels) float32, targets (b, n_targets) raw latents, and how many samples
the step has over all workers. Every worker must have the same number of steps, and at least two rows in each if the
network has BatchNorm; the order must follow from (seed, epoch)."""


N_ROWS_BATCH = 64
"""Rows that are predicted or validated at a time: some seven float32 of each target and row are alive then."""


class Context(Protocol):
    """What the loop needs to know of where it runs."""

    rank: int
    world_size: int
    device: torch.device

    def prepare(self, model: nn.Module) -> nn.Module:
        """Move the model to the device, in place, and return it or what averages its gradients over workers (DDP)."""

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over all workers."""

    def report(self, metrics: dict[str, float], checkpoint: dict | None) -> None:
        """Called by every worker after every epoch. Write the checkpoint, if any, before returning: its tensors live
        on. It is the same on all workers, so one of them is enough."""

    def resume(self) -> dict | None:
        """The last checkpoint of this run, on the CPU; None at the start."""


@dataclass
class LocalContext:
    """One process. With a checkpoint path, a run that was stopped goes on when it is started again."""

    device: torch.device = torch.device("cpu")
    checkpoint: Path | None = None
    rank: int = 0
    world_size: int = 1
    history: list[dict[str, float]] = field(default_factory=list)
    """Metrics reported by this process, one entry per epoch."""

    def prepare(self, model: nn.Module) -> nn.Module:
        return model.to(self.device)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return values

    def report(self, metrics: dict[str, float], checkpoint: dict | None) -> None:
        if checkpoint is not None and self.checkpoint is not None:
            partial = self.checkpoint.with_name(self.checkpoint.name + ".partial")
            torch.save(checkpoint, partial)
            os.replace(partial, self.checkpoint)
        self.history.append(metrics)

    def resume(self) -> dict | None:
        if self.checkpoint is None or not self.checkpoint.exists():
            return None
        return torch.load(self.checkpoint, map_location="cpu", weights_only=True)


class DivergedError(ValueError):
    """A loss is not finite: these settings lead nowhere, however often they are tried."""


class TooLargeError(ValueError):
    """A network does not fit into the memory at hand."""


class TargetScale:
    """Between raw targets and the standardised ones that networks predict; targets that never vary are left out."""

    def __init__(self, mean: np.ndarray | torch.Tensor, std: np.ndarray | torch.Tensor, device: torch.device):
        self.mean, self.std = (torch.as_tensor(v, dtype=torch.float32, device=device) for v in (mean, std))
        self.alive = (self.std > 0).float()
        self.inverse = self.alive / self.std.where(self.std > 0, 1)
        self.n_alive = int(self.alive.sum())
        if self.mean.shape != self.std.shape or not self.n_alive:
            raise ValueError(
                f"target_mean {tuple(self.mean.shape)} and target_std {tuple(self.std.shape)} must have one value per "
                f"target, and some target must vary (std > 0 in {self.n_alive})"
            )

    def error(self, prediction: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Standardised prediction less standardised raw targets, (n_samples, n_targets); 0 for constant targets."""
        return prediction.float() * self.alive - (targets.float() - self.mean) * self.inverse

    def raw(self, prediction: torch.Tensor) -> torch.Tensor:
        """Standardised prediction to raw units, (n_samples, n_targets) float32."""
        return prediction.float() * self.std + self.mean


def train(
    model: nn.Module,
    batches: Batches,
    validation: tuple[torch.Tensor, torch.Tensor],
    context: Context,
    *,
    n_epochs: int,
    learning_rate: float,
    weight_decay: float,
    patience: int,
    warmup_epochs: int,
    clip_norm: float | None,
    seed: int,
    target_mean: np.ndarray | torch.Tensor,
    target_std: np.ndarray | torch.Tensor,
    checkpoint_every: int = 1,
    rate_factor: Callable[[str], float] | None = None,
) -> dict:
    """Fit the model by AdamW on the mean squared error of standardised targets; keep the best epoch's weights.

    batches: see `Batches`. validation: this worker's share, betas (n, n_voxels) float32 and raw targets (n, n_targets).
    target_mean, target_std: the training targets' moments, (n_targets,). n_epochs, warmup_epochs: see
    `learning_rate_at`. patience: epochs without a better validation loss before stopping. clip_norm: bound on the
    gradient's norm, None for none. checkpoint_every: epochs between checkpoints (the last epoch always has one).
    rate_factor: from a parameter's name to the factor on its learning rate, 0 to leave it as it is; None: 1 for all.
    `DivergedError` if a loss is not finite.

    Returns ``state`` (the best weights, on the CPU), ``best_epoch`` (0-based) and ``history``: per epoch a dict of
    epoch, train_loss, val_loss (standardised), val_mse, val_mae (raw), learning_rate, samples_per_s (all workers).
    """
    for name, value in {"n_epochs": n_epochs, "patience": patience, "checkpoint_every": checkpoint_every}.items():
        if value < 1:
            raise ValueError(f"train: {name} is {value}, must be at least 1")
    scale = TargetScale(target_mean, target_std, context.device)
    resumed = context.resume() or {"history": [], "best": None, "best_epoch": -1}
    history, best, best_epoch = list(resumed["history"]), resumed["best"], resumed["best_epoch"]
    if history:
        model.load_state_dict(resumed["model"])
    groups = parameter_groups(model, rate_factor)
    network = context.prepare(model)
    optimiser = torch.optim.AdamW(groups, lr=learning_rate, weight_decay=weight_decay)
    if history:
        optimiser.load_state_dict(resumed["optimiser"])
    while len(history) < n_epochs and len(history) - 1 - best_epoch < patience:
        epoch = len(history)
        rate = learning_rate_at(epoch, learning_rate=learning_rate, warmup_epochs=warmup_epochs, n_epochs=n_epochs)
        for group in optimiser.param_groups:
            group["lr"] = rate * group["factor"]
        torch.manual_seed(draws.derive(seed, "dropout", epoch, context.rank))
        metrics = {"epoch": epoch, "learning_rate": rate}
        metrics |= _train_epoch(network, batches(epoch), optimiser, context, scale, clip_norm)
        _average_buffers(model, context)
        metrics |= _validate(model, validation, context, scale)
        _check_finite(metrics, clip_norm)
        if best is None or metrics["val_loss"] < history[best_epoch]["val_loss"]:
            best_epoch, best = epoch, {k: v.detach().to("cpu", copy=True) for k, v in model.state_dict().items()}
        history.append(metrics)
        last = epoch + 1 == n_epochs or epoch - best_epoch >= patience
        checkpoint = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "best": best,
                      "best_epoch": best_epoch, "history": list(history)}  # fmt: skip
        context.report(metrics, checkpoint if last or (epoch + 1) % checkpoint_every == 0 else None)
    return {"state": best, "best_epoch": best_epoch, "history": history}


def parameter_groups(model: nn.Module, rate_factor: Callable[[str], float] | None = None) -> list[dict]:
    """The optimiser's groups: parameters by the factor on their learning rate. Those with factor 0 are frozen."""
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        factor = 1.0 if rate_factor is None else float(rate_factor(name))
        parameter.requires_grad_(factor > 0)
        if factor > 0:
            groups.setdefault(factor, []).append(parameter)
    return [{"params": parameters, "factor": factor} for factor, parameters in groups.items()]


def learning_rate_at(epoch: int, *, learning_rate: float, warmup_epochs: int, n_epochs: int) -> float:
    """Rate of one epoch: a linear rise to learning_rate over warmup_epochs, then half a cosine towards 0 at n_epochs.

    Constant within an epoch, so that it needs to know neither the number of steps nor the number of workers.
    """
    if epoch < warmup_epochs:
        return learning_rate * (epoch + 1) / (warmup_epochs + 1)
    progress = (epoch - warmup_epochs) / max(1, n_epochs - warmup_epochs)
    return learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def _train_epoch(
    network: nn.Module,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor, int]],
    optimiser: torch.optim.Optimizer,
    context: Context,
    scale: TargetScale,
    clip_norm: float | None,
) -> dict[str, float]:
    """One pass over this worker's batches.

    A worker's loss is its share of the global mean times world_size, since DDP averages gradients: workers with unequal
    batches together take the very step that one process would take.
    """
    network.train()
    device, n_seen, started = context.device, 0, time.perf_counter()
    total = torch.zeros((), dtype=torch.float64, device=device)
    for betas, targets, n_global in batches:
        with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
            prediction = network(betas.to(device, non_blocking=True))
        squared = scale.error(prediction, targets.to(device, non_blocking=True)).square().sum()
        optimiser.zero_grad(set_to_none=True)
        (squared * (context.world_size / (n_global * scale.n_alive))).backward()
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(network.parameters(), clip_norm)
        optimiser.step()
        total += squared.detach()
        n_seen += n_global
    if not n_seen:
        raise ValueError("train: an epoch without a single batch; are there training samples for every worker?")
    loss = context.sum(total).item() / (n_seen * scale.n_alive)
    return {"train_loss": loss, "samples_per_s": n_seen / (time.perf_counter() - started)}


@torch.no_grad()
def _average_buffers(model: nn.Module, context: Context) -> None:
    """Give all workers the mean of their BatchNorm statistics, so that they validate and keep the same model.

    Within an epoch each keeps its own, of its own shares of the batches: `Context.prepare` must not let DDP broadcast those of
    the first worker over the others'.
    """
    if context.world_size > 1:
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.copy_(context.sum(buffer.clone()) / context.world_size)


@torch.no_grad()
def _validate(
    model: nn.Module,
    validation: tuple[torch.Tensor, torch.Tensor],
    context: Context,
    scale: TargetScale,
    n_samples_batch: int = N_ROWS_BATCH,
) -> dict[str, float]:
    """Loss on standardised targets, MSE and MAE on raw ones, over all workers' shares (which may differ in size)."""
    if len(validation[0]) != len(validation[1]):
        raise ValueError(f"train: validation has {len(validation[0])} rows of betas, {len(validation[1])} of targets")
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=context.device)
    for betas, targets in zip(*(share.split(n_samples_batch) for share in validation)):
        sums += _errors(model(betas.to(context.device)), targets.to(context.device).float(), scale)
    loss, mse, mae, n = context.sum(sums).tolist()
    if not n:
        raise ValueError("train: no validation samples; early stopping needs some: set part of the training set aside")
    n_targets = len(scale.mean)
    return {"val_loss": loss / (n * scale.n_alive), "val_mse": mse / (n * n_targets), "val_mae": mae / (n * n_targets)}


def _errors(prediction: torch.Tensor, targets: torch.Tensor, scale: TargetScale) -> torch.Tensor:
    """Sums of squared standardised errors, squared raw ones and absolute raw ones, and the number of samples, (4,) float64."""
    error = scale.raw(prediction) - targets
    parts = scale.error(prediction, targets).square(), error.square(), error.abs()
    sums = [part.sum(dtype=torch.float64) for part in parts]
    return torch.stack([*sums, sums[0].new_tensor(len(targets))])


def _check_finite(metrics: dict[str, float], clip_norm: float | None) -> None:
    if not all(math.isfinite(metrics[name]) for name in ("train_loss", "val_loss")):
        raise DivergedError(
            f"training diverged in epoch {metrics['epoch']}: train_loss {metrics['train_loss']}, val_loss "
            f"{metrics['val_loss']}. Try a learning_rate below {metrics['learning_rate']:g}, more warmup_epochs or a "
            f"clip_norm below {clip_norm}, and make sure that betas and targets hold no NaN. "
            "The last checkpoint is still good."
        )


def count_parameters(build: Callable[[], nn.Module]) -> int:
    """Parameters of the network that build makes, without the memory for them."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build().parameters())


def require_memory(n_parameters: int, n_inputs: int, n_targets: int, batch_size: int, n_validation: int, free: int) -> int:
    """Bytes that training will take at least, before any of them is taken; `TooLargeError` if they are more than are free.

    Five float32 for each parameter (weight, gradient, AdamW's two moments, the best epoch's weight); n_validation rows of
    n_inputs betas and n_targets, which stay; and the larger of a training batch of this worker (betas; targets, prediction, error
    and gradient) and a batch of validation (`N_ROWS_BATCH`). n_parameters, n_validation: of all networks that are held at once.
    """
    network, held = 5 * 4 * n_parameters, 4 * n_validation * (n_inputs + n_targets)
    batch = 4 * max(batch_size * (n_inputs + 4 * n_targets), 7 * min(N_ROWS_BATCH, n_validation) * n_targets)
    if network + held + batch > free:
        raise TooLargeError(
            f"this network is too large: training its {n_parameters:,} parameters takes {network / 1e9:.1f} GB, a batch of "
            f"{batch_size} another {batch / 1e9:.1f} GB, {n_validation} validation images {held / 1e9:.1f} GB, and "
            f"{free / 1e9:.1f} GB are free. Make it narrower, predict fewer layers or tokens, or lower the batch_size if that is "
            "what is large."
        )
    return network + held + batch


def free_memory(device: torch.device) -> int:
    """Bytes that a new process could have: of the GPU, or of this machine or container."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    meminfo, cgroup = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
    limit, used, stat = (cgroup / f"memory.{name}" for name in ("max", "current", "stat"))
    if meminfo.is_file():
        found += [1024 * int(line.split()[1]) for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable")]
    if limit.is_file() and used.is_file() and limit.read_text().strip() != "max":
        cached = dict(line.split() for line in stat.read_text().splitlines()).get("inactive_file", 0)  # given back when wanted
        found.append(int(limit.read_text()) - int(used.read_text()) + int(cached))
    return min(found)


@torch.no_grad()
def predict(
    model: nn.Module,
    betas: torch.Tensor | np.ndarray,
    target_mean: np.ndarray | torch.Tensor,
    target_std: np.ndarray | torch.Tensor,
    batch_size: int = N_ROWS_BATCH,
) -> torch.Tensor:
    """Raw targets (n_samples, n_targets) float32 on the CPU, from z-scored betas (n_samples, n_voxels).

    In evaluation mode: a sample's prediction does not depend on the others, nor (to rounding) on batch_size.
    """
    device = next(model.parameters()).device
    scale, was_training = TargetScale(target_mean, target_std, device), model.training
    model.eval()
    parts = torch.as_tensor(betas, dtype=torch.float32).split(batch_size)
    out = torch.cat([scale.raw(model(part.to(device))).cpu() for part in parts])
    model.train(was_training)
    return out


def memory_batches(
    betas: torch.Tensor | np.ndarray, targets: Any, batch_size: int, seed: int, rank: int = 0, world_size: int = 1
) -> Batches:
    """Batches over tensors or arrays in memory: a fresh permutation per (seed, epoch), nothing dropped.

    betas (n, n_voxels), targets (n, n_targets): whatever gives some of its rows for an array of row numbers.
    batch_size counts samples over all workers. An epoch is cut into ceil(n / batch_size) nearly equal batches, fewer if
    a worker would have less than the two rows that BatchNorm needs; of each, worker `rank` has every world_size-th row.
    """
    n = len(betas)
    if len(targets) != n or batch_size < 1 or n < 2 * world_size:
        raise ValueError(
            f"memory_batches: {n} rows of betas, {len(targets)} of targets, batch_size {batch_size}, "
            f"{world_size} workers; rows must match, and every worker needs at least two"
        )
    n_batches = min(math.ceil(n / batch_size), n // (2 * world_size))

    def batches(epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
        order = draws.rng(seed, "batches", epoch).permutation(n)
        for rows in np.array_split(order, n_batches):
            mine = rows[rank::world_size]
            yield torch.as_tensor(betas[mine]), torch.as_tensor(targets[mine]), len(rows)

    return batches
