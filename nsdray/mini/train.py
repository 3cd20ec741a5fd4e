"""Training of the mini models on drawn scenes that are in no stimulus set.

Everything follows from the seed and the step: scene number i of the stream "training" is drawn when it is needed.
A run that was stopped goes on from its last checkpoint.
"""
from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tqdm import tqdm

from nsdray import seeds as draws
from nsdray.models.vdvae import VDVAE, VDVAEConfig
from nsdray.nsd.scenes import draw_scene, make_scene
from nsdray.nsd.stimuli import resize

CARD_LAYERS = (2, 6, 14, 15, 23, 31)
TRUNCATIONS = (6, 14, 15, 23)
"""Half of the batches draw all layers after one of these from the prior, so that the early ones carry the picture."""


def scene_batch(indices: range, size: int, purpose: str = "training", seed: int = 0) -> torch.Tensor:
    """Scenes as (n, 3, size, size) float in [0, 1], drawn at 64 pixels and resized as stimuli are."""
    pictures = np.stack([draw_scene(make_scene(seed, purpose, i)) for i in indices])
    return torch.from_numpy(resize(pictures, size)).permute(0, 3, 1, 2).float() / 255


def train_vdvae(
    checkpoint: Path,
    config: VDVAEConfig,
    n_steps: int = 6000,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
    seed: int = 0,
    save_every_s: float = 60.0,
) -> VDVAE:
    """Train the mini VDVAE by the evidence lower bound; return the averaged weights' model.

    checkpoint: file of the whole training state, written every save_every_s seconds and read again on a new start.
    """
    torch.manual_seed(seed)
    model = VDVAE(config).to(memory_format=torch.channels_last)
    average = VDVAE(config)
    average.load_state_dict(model.state_dict())
    optimiser = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    step = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimiser.load_state_dict(state["optimiser"])
        step = state["step"]
    saved_at = time.monotonic()
    progress = tqdm(total=n_steps, initial=step, desc="mini VDVAE", unit="step", mininterval=10)
    while step < n_steps:
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * schedule(step, n_steps)
        log = vdvae_step(model, optimiser, step, batch_size, seed)
        step += 1
        decay = min(0.999, (step + 1) / (step + 10))
        with torch.no_grad():
            for mean, new in zip(average.parameters(), model.parameters()):
                mean.lerp_(new, 1 - decay)
        progress.update()
        progress.set_postfix(log, refresh=False)
        if time.monotonic() - saved_at > save_every_s or step == n_steps:
            state = {"model": model.state_dict(), "average": average.state_dict(),
                     "optimiser": optimiser.state_dict(), "step": step}  # fmt: skip
            partial = checkpoint.with_suffix(".partial")
            torch.save(state, partial)
            os.replace(partial, checkpoint)
            saved_at = time.monotonic()
    return average.eval()


def schedule(step: int, n_steps: int, n_warmup: int = 100) -> float:
    """Factor on the learning rate: linear warm-up, then cosine decay to 2 %."""
    return min(1.0, (step + 1) / n_warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / n_steps)))


def vdvae_step(model: VDVAE, optimiser: torch.optim.Optimizer, step: int, batch_size: int, seed: int) -> dict:
    """One optimiser step on the scenes that belong to it. Returns what the progress bar shows, in nats per value."""
    images = scene_batch(range(step * batch_size, (step + 1) * batch_size), model.config.image_size, seed=seed)
    random = draws.rng(seed, "truncation", step)
    n_posterior = int(random.choice(TRUNCATIONS)) if random.random() < 0.5 else None
    torch.manual_seed(draws.derive(seed, "vdvae step", step) % 2**32)
    with torch.autocast("cpu", torch.bfloat16):
        likelihood, rates = model.elbo(images, n_posterior)
    n_values = images[0].numel()
    kl_weight = min(1.0, 0.2 + 0.8 * step / 500)
    loss = (kl_weight * rates.sum(1) - likelihood).mean() / n_values
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    if torch.isfinite(norm):  # a rare overflow in bf16 must not destroy the weights
        optimiser.step()
    if n_posterior is not None:
        return {f"to_{n_posterior}": f"{loss.item():.3f}"}
    return {"nll": f"{-likelihood.mean().item() / n_values:.3f}", "kl": f"{rates.sum(1).mean().item() / n_values:.3f}"}


def save_half(model: torch.nn.Module, path: Path) -> None:
    """Write a model's weights as fp16 safetensors."""
    save_file({name: value.half().contiguous() for name, value in model.state_dict().items()}, str(path))


def held_out(size: int, n: int = 256) -> Iterator[torch.Tensor]:
    """Batches of scenes that no training has seen, (32, 3, size, size)."""
    for start in range(0, n, 32):
        yield scene_batch(range(start, start + 32), size, purpose="card")
