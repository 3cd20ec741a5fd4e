"""An independent judge of pictures of drawn scenes: a small network that names the objects it sees.

It learns from drawn scenes of its own stream ("judge") and their contents, and never from CLIP, whose tokens the pictures
are made from. Training takes a minute or two on one thread, so no weights are kept.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from nsdray import seeds as draws
from nsdray.mini.loop import scene_batch
from nsdray.nsd.scenes import COLOURS, KINDS, Scene, make_scene

N_SLOTS = 2
"""A scene has one or two objects; slot 0 is the left one or the only one."""
NOTHING = len(KINDS)
"""The kind in slot 1 of a scene of one object."""
SAME_PLACE = 0.14
"""Fraction of the width. Two objects of a scene are at least twice as far apart, so none is at the other's place."""


class Contents(NamedTuple):
    """What n pictures show, (n, N_SLOTS) each. Colour and x mean nothing where there is nothing."""

    kind: torch.Tensor
    """Index into KINDS, or NOTHING."""
    colour: torch.Tensor
    """Index into COLOURS."""
    x: torch.Tensor
    """Centre, from the left, as a fraction of the width."""


class Scores(NamedTuple):
    """Shares of the objects of the scenes, in [0, 1], higher is better. Chance is some 0.14, 0.06 and 0.09."""

    kind: float
    """An object of this kind is in the picture, wherever."""
    place: float
    """An object of this kind is at this place."""
    colour: float
    """What is at this place, of whatever kind, has this colour."""


class Judge(nn.Module):
    """A convolutional network on 64 x 64 pictures."""

    def __init__(self) -> None:
        super().__init__()
        layers, widths = [], (3, 32, 64, 128, 128)
        for before, width in zip(widths, widths[1:]):
            layers += [nn.Conv2d(before, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        self.features = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * widths[-1], 256), nn.ReLU())
        self.sizes = (len(KINDS) + 1, len(COLOURS), 1)
        self.head = nn.Linear(256, N_SLOTS * sum(self.sizes))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits of kinds (n, N_SLOTS, 11) and colours (n, N_SLOTS, 8), and x (n, N_SLOTS), from (n, 3, 64, 64) in [0, 1]."""
        kind, colour, x = self.head(self.features(images - 0.5)).unflatten(1, (N_SLOTS, -1)).split(self.sizes, -1)
        return kind, colour, x.squeeze(-1)

    @torch.inference_mode()
    def look(self, pictures: np.ndarray) -> Contents:
        """What uint8 pictures (n, 64, 64, 3) show."""
        kind, colour, x = self(torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255)
        return Contents(kind.argmax(-1), colour.argmax(-1), x)


def contents(scenes: Sequence[Scene]) -> Contents:
    """What scenes hold."""
    kind = torch.full((len(scenes), N_SLOTS), NOTHING)
    colour, x = torch.zeros(len(scenes), N_SLOTS, dtype=torch.long), torch.zeros(len(scenes), N_SLOTS)
    for i, scene in enumerate(scenes):
        for slot, thing in enumerate(sorted(scene.objects, key=lambda thing: thing.x)):
            kind[i, slot], x[i, slot] = KINDS.index(thing.kind), thing.x
            colour[i, slot] = list(COLOURS).index(thing.colour)
    return Contents(kind, colour, x)


def train_judge(n_steps: int = 1200, batch_size: int = 64, seed: int = 0) -> Judge:
    """Half of the pictures are noisy and half are blurred, so that softer edges than drawn ones do not mislead it."""
    torch.manual_seed(seed)
    judge = Judge().to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, n_steps)
    for step in tqdm(range(n_steps), desc="mini judge", unit="step", mininterval=10):
        indices = range(step * batch_size, (step + 1) * batch_size)
        images = scene_batch(indices, 64, purpose="judge", seed=seed)
        truth = contents([make_scene(seed, "judge", i) for i in indices])
        random = draws.rng(seed, "judge step", step)
        blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        is_blurred, is_noisy = (torch.from_numpy(random.random((batch_size, 1, 1, 1)) < 0.5) for _ in range(2))
        noise = torch.from_numpy(random.normal(0, 0.06, images.shape)).float()
        images = torch.where(is_blurred, blurred, images) + is_noisy * noise
        kind, colour, x = judge(images.to(memory_format=torch.channels_last))
        there = truth.kind != NOTHING
        loss = F.cross_entropy(kind.flatten(0, 1), truth.kind.flatten()) + F.cross_entropy(colour[there], truth.colour[there])
        loss = loss + 5 * (x - truth.x)[there].abs().mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
    return judge.eval().requires_grad_(False)


def compare(seen: Contents, shown: Contents) -> Scores:
    """Scores of pictures that show ``shown`` beside scenes that hold ``seen``."""
    there = seen.kind != NOTHING
    matches = (seen.kind[:, :, None] == shown.kind[:, None]) & there[:, :, None]  # (n, slot of the scene, slot of the picture)
    near = (seen.x[:, :, None] - shown.x[:, None]).abs() < SAME_PLACE
    near &= (shown.kind != NOTHING)[:, None]
    same_colour = seen.colour[:, :, None] == shown.colour[:, None]
    n = there.sum()
    # two objects of one kind want two of that kind
    twins = there.all(1) & (seen.kind[:, 0] == seen.kind[:, 1])
    found = torch.where(twins, matches[:, 0].sum(1), matches.any(2).sum(1))
    return Scores(*((hits.sum() / n).item() for hits in (found, (matches & near).any(2), (same_colour & near)[there].any(1))))
