"""Training of the mini models on drawn scenes that are in no stimulus set.

Everything follows from the seed and the step: scene number i of the stream "training" is drawn when it is needed.
A run that was stopped goes on from its last checkpoint.
"""
from __future__ import annotations

import hashlib
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tqdm import tqdm

from nsdray import seeds as draws
from nsdray.metrics.pixel import pixcorr, psnr
from nsdray.models.vdvae import VDVAE, VDVAEConfig, load_vdvae
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


def held_out(size: int, n: int) -> tuple[torch.Tensor, np.ndarray]:
    """Scenes that no training has seen, as float (n, 3, size, size) in [0, 1] and as uint8 (n, size, size, 3)."""
    images = scene_batch(range(n), size, purpose="card")
    return images, (images.permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8)


def vdvae_card(weights: Path, config: VDVAEConfig, n_steps: int, batch_size: int, n_images: int = 256) -> str:
    """The card of the shipped VDVAE, in Markdown: what it is, how it was made, and held-out figures of these weights."""
    model = load_vdvae(weights, config)
    images, truth = held_out(config.image_size, n_images)
    seeds = draws.image_seeds(0, range(n_images))
    latents = model.encode(images, seeds=seeds)
    lines = []
    for n_layers in CARD_LAYERS:
        scores = []
        for deterministic in (False, True):
            pictures = model.decode(latents[:n_layers], seeds, deterministic=deterministic).numpy()
            scores += [f"{psnr(truth, pictures).mean():.2f}", f"{pixcorr(truth, pictures).mean():.3f}"]
        lines.append(f"| {n_layers} | {config.n_latents(n_layers):,} | " + " | ".join(scores) + " |")
    shape = f"{sum(p.numel() for p in model.parameters()):,} parameters, {config.image_size} x {config.image_size} pictures"
    n_layers, table = len(config.layer_shapes), "\n".join(lines)
    return f"""# Mini VDVAE

The very deep VAE of the offline default: the class of the published model (`nsdray.models.vdvae.VDVAE`) with a small
configuration: {shape}. Its {n_layers} latent layers have the shapes of the first
{n_layers} layers of OpenAI's ImageNet-64 model, so 15 layers are 13,344 values and 31 are 91,168. It knows drawn scenes
only and stands in for no published model.

- **Made by** `python jobs/train_mini_models.py --n-steps {n_steps}`, on the CPU, bf16 autocast: {n_steps:,} steps of
  {batch_size} scenes from the stream "training" of `nsdray.nsd.scenes`, which shares no scene with any stimulus set.
  AdamW, warm-up and cosine decay, averaged weights.
- **Objective**: the evidence lower bound. In half of the batches all layers after the 6th, 14th, 15th or 23rd are drawn
  from the prior instead of the posterior. That is a lower bound too, and it makes the early layers carry the picture.
- **Weights**: fp16 safetensors, SHA-256 `{hashlib.sha256(weights.read_bytes()).hexdigest()}`.

Held-out figures: {n_images} scenes of the stream "card", true latents (posterior samples) of the first layers, the rest
from the prior. *Drawn*: prior and pixels are drawn, as in decoding. *Most likely*: `deterministic=True`.

| layers | latents | PSNR, dB (drawn) | PixCorr (drawn) | PSNR, dB (most likely) | PixCorr (most likely) |
|---|---|---|---|---|---|
{table}
"""
