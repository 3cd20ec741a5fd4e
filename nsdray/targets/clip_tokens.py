"""Pictures and captions to CLIP tokens, the regression targets of stage 2.

Two departures from Brain-Diffuser's scripts, which its recipe has too. They resize a stimulus twice, from 425 to 512 pixels by
a bilinear and then to 224 by a bicubic filter; here it is resized once, by CLIP's own bicubic filter. They average over at most
five captions, for their table holds five columns; here all of COCO's captions of a picture count, six or seven for some.
"""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from nsdray.models.batching import padded_batches
from nsdray.models.clip import CLIP, clip_pixels


def vision_tokens(clip: CLIP, pictures: np.ndarray, batch_size: int = 32) -> np.ndarray:
    """Tokens of pictures, uint8 (n, h, w, 3) to float16 (n, n_tokens, embed_dim)."""
    batches = []
    for rows, n_valid in padded_batches(len(pictures), batch_size):
        images = clip_pixels(pictures[rows], clip.config.image_size)
        batches.append(clip.vision_tokens(images)[:n_valid].half().cpu().numpy())
    return np.concatenate(batches)


def text_tokens(clip: CLIP, captions: Sequence[Sequence[str]], batch_size: int = 32) -> np.ndarray:
    """Mean over each picture's captions of their (already normalised) tokens, float16 (n, n_tokens, embed_dim).

    captions: the captions of each picture; empty ones are left out. ValueError for a picture without any.
    """
    captions = [[text for text in texts if text.strip()] for texts in captions]
    if empty := [i for i, texts in enumerate(captions) if not texts]:
        raise ValueError(f"{len(empty)} pictures have no caption, the first is number {empty[0]} of those given")
    flat = [text for texts in captions for text in texts]
    tokens = []
    for rows, n_valid in padded_batches(len(flat), batch_size):
        tokens.append(clip.text_tokens([flat[i] for i in rows])[:n_valid].cpu().numpy())
    starts = np.cumsum([0] + [len(texts) for texts in captions[:-1]])
    counts = np.array([len(texts) for texts in captions])[:, None, None]
    return (np.add.reduceat(np.concatenate(tokens), starts) / counts).astype(np.float16)


def unconditional_tokens(clip: CLIP) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens that classifier-free guidance steers away from: of a mid-grey picture and of the empty caption, (1, n, d) each."""
    size = clip.config.image_size
    return clip.vision_tokens(torch.full((1, 3, size, size), 0.5)), clip.text_tokens([""])
