"""Stage 2's frame: what is handed to the diffusion model, batch by batch."""
from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from nsdray.generators.stage2 import refine_pictures, round_trip
from nsdray.seeds import image_seeds, normal

N, SIZE = 5, 16


class FakeDiffusion:
    """Gives back what it was told to start from, and keeps all it was told."""

    image_size = SIZE

    def __init__(self):
        self.calls = []

    def generate(self, seeds, vision, text, unconditional, images, **settings):
        self.calls.append((list(seeds), vision, text, images, settings))
        if images is None:
            return torch.zeros(len(seeds), SIZE, SIZE, 3, dtype=torch.uint8)
        return (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


    def encode(self, images, seeds):
        assert len(images) == len(seeds)
        return images

    def decode(self, latents):
        return (latents * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


@pytest.fixture
def stage1():
    return np.random.default_rng(0).integers(0, 256, (N, 8, 8, 3), dtype=np.uint8)


def enlarged(pictures):
    return np.stack([np.asarray(Image.fromarray(p).resize((SIZE, SIZE), Image.Resampling.BICUBIC)) for p in pictures])


def test_pictures_are_enlarged_and_batches_padded(stage1):
    diffusion, vision = FakeDiffusion(), np.random.default_rng(1).normal(size=(N, 3, 4)).astype(np.float16)
    ids = [7, 1, 9, 4, 2]
    refined = refine_pictures(diffusion, stage1, vision, None, (None, None), ids, seed=3, batch_size=2, guidance=2.0)
    np.testing.assert_array_equal(refined, enlarged(stage1))
    assert [len(seeds) for seeds, *_ in diffusion.calls] == [2, 2, 2]  # the last row is repeated
    assert [s for seeds, *_ in diffusion.calls for s in seeds][:N] == image_seeds(3, ids)
    assert all(text is None and settings == {"guidance": 2.0} for _, _, text, _, settings in diffusion.calls)
    np.testing.assert_array_equal(np.concatenate([v for _, v, *_ in diffusion.calls])[:N], vision.astype(np.float32))


def test_the_round_trip_takes_the_pictures_that_stage_2_starts_from(stage1):
    np.testing.assert_array_equal(round_trip(FakeDiffusion(), stage1, range(N), batch_size=2), enlarged(stage1))


def test_without_a_picture_it_starts_from_nothing():
    diffusion = FakeDiffusion()
    refine_pictures(diffusion, None, None, np.zeros((N, 2, 4)), (None, None), range(N))
    assert diffusion.calls[0][3] is None and diffusion.calls[0][1] is None


@pytest.mark.parametrize("amplitude", [8.0, 256.0])
def test_noise_is_added_in_0_to_255_and_clipped(stage1, amplitude):
    noisy = refine_pictures(FakeDiffusion(), stage1, np.zeros((N, 1, 4)), None, (None, None), range(N), seed=1, noise=amplitude)
    draws = normal(image_seeds(1, range(N)), "stage-1 noise", (3, SIZE, SIZE)).permute(0, 2, 3, 1).numpy()
    expected = np.clip(enlarged(stage1) + amplitude * draws, 0, 255)
    assert np.abs(noisy - expected).max() <= 0.51
    alone = refine_pictures(FakeDiffusion(), stage1[3:4], np.zeros((1, 1, 4)), None, (None, None), [3], seed=1, noise=amplitude)
    np.testing.assert_array_equal(alone[0], noisy[3])  # an image's noise is its own
