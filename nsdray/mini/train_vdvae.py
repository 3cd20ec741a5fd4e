"""Training of the mini VDVAE on drawn scenes, and its card."""
from __future__ import annotations

from pathlib import Path

import torch

from nsdray import seeds as draws
from nsdray.metrics.pixel import pixcorr, psnr
from nsdray.mini.cards import weights_lines
from nsdray.mini.loop import held_out, scene_batch, train_mini
from nsdray.models.vdvae import VDVAE, VDVAEConfig, load_vdvae

CARD_LAYERS = (2, 6, 14, 15, 23, 31)
TRUNCATIONS = (6, 14, 15, 23)
"""Half of the batches draw all layers after one of these from the prior, so that the early ones carry the picture."""


def train_vdvae(
    checkpoint: Path, config: VDVAEConfig, n_steps: int, batch_size: int = 32, seed: int = 0, device: str = "cpu"
) -> VDVAE:
    """Train the mini VDVAE by the evidence lower bound; return the averaged weights' model."""
    torch.manual_seed(seed)
    model = VDVAE(config).to(device)

    def loss_of(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        images = scene_batch(range(step * batch_size, (step + 1) * batch_size), config.image_size, seed=seed).to(device)
        random = draws.rng(seed, "truncation", step)
        n_posterior = int(random.choice(TRUNCATIONS)) if random.random() < 0.5 else None
        torch.manual_seed(draws.derive(seed, "vdvae step", step) % 2**32)
        with torch.autocast(device, torch.bfloat16):
            likelihood, rates = model.elbo(images, n_posterior)
        n_values = images[0].numel()
        kl_weight = min(1.0, 0.2 + 0.8 * step / 500)
        loss = (kl_weight * rates.sum(1) - likelihood).mean() / n_values
        if n_posterior is not None:
            return loss, {f"to_{n_posterior}": loss.item()}
        return loss, {"nll": -likelihood.mean().item() / n_values, "kl": rates.sum(1).mean().item() / n_values}

    average = train_mini("VDVAE", model, loss_of, checkpoint, n_steps, learning_rate=1e-3)
    assert isinstance(average, VDVAE)
    return average


def vdvae_card(weights: Path, config: VDVAEConfig, made_by: str, n_steps: int, batch_size: int = 32, n_images: int = 256) -> str:
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

{made_by}
- **Training**: {n_steps:,} steps of {batch_size} scenes from the stream "training" of `nsdray.nsd.scenes`, which shares no
  scene with any stimulus set. AdamW, warm-up and cosine decay, averaged weights.
- **Objective**: the evidence lower bound. In half of the batches all layers after the 6th, 14th, 15th or 23rd are drawn
  from the prior instead of the posterior. That is a lower bound too, and it makes the early layers carry the picture.
{weights_lines({"weights": weights})}

Held-out figures: {n_images} scenes of the stream "card", true latents (posterior samples) of the first layers, the rest
from the prior. *Drawn*: prior and pixels are drawn, as in decoding. *Most likely*: `deterministic=True`.

| layers | latents | PSNR, dB (drawn) | PixCorr (drawn) | PSNR, dB (most likely) | PixCorr (most likely) |
|---|---|---|---|---|---|
{table}
"""
