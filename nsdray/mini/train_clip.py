"""Training of the mini CLIP on drawn scenes and their captions, and its card."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from nsdray import seeds as draws
from nsdray.mini.cards import weights_lines
from nsdray.mini.loop import held_out, scene_batch, train_mini
from nsdray.models.clip import CLIP, CLIPConfig, load_clip
from nsdray.nsd.scenes import caption_scene, make_scene


def train_clip(
    checkpoint: Path, config: CLIPConfig, n_steps: int, batch_size: int = 128, seed: int = 0, device: str = "cpu"
) -> CLIP:
    """Contrastive training (Radford et al. 2021): each scene with one of its five captions, drawn anew for each step."""
    torch.manual_seed(seed)
    clip = CLIP(config).to(device)

    def loss_of(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        indices = range(step * batch_size, (step + 1) * batch_size)
        images = scene_batch(indices, config.image_size, seed=seed)
        chosen = draws.rng(seed, "caption", step).integers(0, 5, batch_size)
        captions = [caption_scene(make_scene(seed, "training", i), seed, i)[c] for i, c in zip(indices, chosen)]
        with torch.autocast(device, torch.bfloat16):
            vision = clip.vision_tokens(images)[:, 0]
            text = clip.text_embeddings(captions)
        logits = clip.model.logit_scale.exp().clamp(max=100) * vision.float() @ text.float().T
        truth = torch.arange(batch_size, device=device)
        loss = (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2
        return loss, {"loss": loss.item(), "right": (logits.argmax(1) == truth).float().mean().item()}

    average = train_mini("CLIP", clip, loss_of, checkpoint, n_steps, learning_rate=1e-3, weight_decay=0.1)
    assert isinstance(average, CLIP)
    return average


def clip_card(weights: Path, config: CLIPConfig, made_by: str, n_steps: int, batch_size: int = 128, n_images: int = 300) -> str:
    """The card of the shipped CLIP, in Markdown, with held-out figures of these weights."""
    clip = load_clip(weights, config)
    images, _ = held_out(config.image_size, n_images)
    captions = [caption_scene(make_scene(0, "card", i), 1, i) for i in range(n_images)]
    vision = clip.vision_tokens(images)[:, 0]
    one = clip.text_embeddings([texts[0] for texts in captions])
    similarity = (vision @ one.T).numpy()
    place = np.arange(n_images)
    forward = (similarity.argmax(1) == place).mean()
    backward = (similarity.argmax(0) == place).mean()
    top5 = (np.argsort(-similarity, 0)[:5] == place).any(0).mean()
    return f"""# Mini CLIP

CLIP of the offline default: open_clip's class with a small configuration ({sum(p.numel() for p in clip.parameters()):,}
parameters, three quarters of them the embedding of the full vocabulary, of which the scenes' captions use some 60 words).
{config.image_size} x {config.image_size} pictures give {config.n_vision_tokens} tokens, captions {config.n_text_tokens}, of
{config.embed_dim} values each. It knows drawn scenes only and stands in for no published model.

{made_by}
- **Training**: {n_steps:,} steps of {batch_size} scenes of the stream "training" of `nsdray.nsd.scenes`, each with one of its
  five captions. Contrastive loss, AdamW, warm-up and cosine decay, averaged weights.
{weights_lines({"weights": weights})}

Held-out figures: {n_images} scenes of the stream "card", one caption each (chance {1 / n_images:.4f}; some captions fit
several scenes).

| picture to caption, first | caption to picture, first | caption to picture, among the first five |
|---|---|---|
| {forward:.3f} | {backward:.3f} | {top5:.3f} |
"""
