"""The training loop of the mini models: drawn scenes that are in no stimulus set, averaged weights, resumable.

Everything follows from the seed and the step: scene number i of the stream "training" is drawn when it is needed.
"""
from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from nsdray.nsd.scenes import draw_scene, make_scene
from nsdray.nsd.stimuli import resize


def scene_batch(indices: range, size: int, purpose: str = "training", seed: int = 0) -> torch.Tensor:
    """Scenes as (n, 3, size, size) float in [0, 1], drawn at 64 pixels and resized as stimuli are."""
    pictures = np.stack([draw_scene(make_scene(seed, purpose, i)) for i in indices])
    return torch.from_numpy(resize(pictures, size)).permute(0, 3, 1, 2).float() / 255


def held_out(size: int, n: int) -> tuple[torch.Tensor, np.ndarray]:
    """Scenes that no training has seen, as float (n, 3, size, size) in [0, 1] and as uint8 (n, size, size, 3)."""
    images = scene_batch(range(n), size, purpose="card")
    return images, (images.permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8)


def cosine(step: int, n_steps: int, n_warmup: int = 100) -> float:
    """Factor on the learning rate: linear warm-up, then cosine decay to 2 %."""
    return min(1.0, (step + 1) / n_warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / n_steps)))


def trapezoid(step: int, n_steps: int, n_warmup: int = 100) -> float:
    """Factor on the learning rate: linear warm-up, constant, linear decay to 2 % over the last quarter.

    A run may be given more steps before its decay has begun.
    """
    return min(1.0, (step + 1) / n_warmup) * min(1.0, 0.02 + 0.98 * (n_steps - step) / (0.25 * n_steps))


def train_mini(
    name: str,
    model: nn.Module,
    loss_of: Callable[[int], tuple[torch.Tensor, dict[str, float]]],
    checkpoint: Path,
    n_steps: int,
    learning_rate: float,
    weight_decay: float = 0.01,
    schedule: Callable[[int, int], float] = cosine,
    factor: Callable[[str], float] = lambda name: 1.0,
    save_every_s: float = 60.0,
) -> nn.Module:
    """Minimise loss_of(step) by AdamW; return a copy of the model with weights averaged over the last 1,000 steps or so.

    loss_of returns the loss and what the progress bar shows. factor: of the learning rate, by a parameter's name.
    checkpoint: file of the whole training state, written every save_every_s seconds and read again on a new start. The bar also
    counts the steps since then that were skipped because a gradient was not finite. ValueError if it has more steps already.
    """
    model.to(memory_format=torch.channels_last)
    average = copy.deepcopy(model)
    groups = [{"params": [parameter], "factor": factor(name)} for name, parameter in model.named_parameters()]
    optimiser = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), weight_decay=weight_decay)
    step, n_skipped = 0, 0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimiser.load_state_dict(state["optimiser"])
        step = state["step"]
        if step > n_steps:
            raise ValueError(
                f"{checkpoint} has {step} steps of the mini {name} already, more than the {n_steps} asked for: ask for as many, "
                "or delete it"
            )
    saved_at = time.monotonic()
    progress = tqdm(total=n_steps, initial=step, desc=f"mini {name}", unit="step", mininterval=10)
    while step < n_steps:
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * group["factor"] * schedule(step, n_steps)
        loss, log = loss_of(step)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if torch.isfinite(norm):  # a rare overflow in bf16 must not destroy the weights
            optimiser.step()
        else:
            n_skipped += 1
        step += 1
        decay = min(0.999, (step + 1) / (step + 10))
        with torch.no_grad():
            for mean, new in zip(average.parameters(), model.parameters()):
                mean.lerp_(new, 1 - decay)
        progress.update()
        shown = {key: f"{value:.4f}" for key, value in log.items()} | ({"skipped": n_skipped} if n_skipped else {})
        progress.set_postfix(shown, refresh=False)
        if time.monotonic() - saved_at > save_every_s or step == n_steps:
            state = {"model": model.state_dict(), "average": average.state_dict(),
                     "optimiser": optimiser.state_dict(), "step": step}  # fmt: skip
            partial = checkpoint.with_suffix(".partial")
            torch.save(state, partial)
            os.replace(partial, checkpoint)
            saved_at = time.monotonic()
    return average.eval().requires_grad_(False)


def save_half(model: nn.Module, path: Path) -> None:
    """Write a model's weights as fp16 safetensors."""
    write_tensors({name: value.half() for name, value in model.state_dict().items()}, path)


def write_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write safetensors, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file({name: value.contiguous() for name, value in tensors.items()}, str(partial))
    os.replace(partial, path)
