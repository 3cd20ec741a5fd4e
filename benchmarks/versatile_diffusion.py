"""Stage 2 at full size beside the reference's way. Random weights, 512 x 512 pictures.

    python benchmarks/versatile_diffusion.py                  # on a GPU 50 steps; on a CPU 2 steps, some minutes
    python benchmarks/versatile_diffusion.py --n-images 16 --batch-size 8

The reference takes one picture at a time in half precision and computes the unconditional tokens anew for each (on two GPUs
at once; here on one device). nsdray takes batches in bf16 and computes those tokens once. Each way runs in its own process.
Prints seconds a picture, the ratio, and each way's peak memory (of the process, or of the GPU).
"""
from __future__ import annotations

import argparse
import multiprocessing
import resource
import time

import torch
from diffusers import AutoencoderKL

from nsdray.models.clip import CLIP, CLIPConfig
from nsdray.models.versatile_diffusion import (
    PUBLISHED_SCHEDULER,
    PUBLISHED_UNET,
    PUBLISHED_VAE,
    VersatileDiffusion,
    build_unet,
)
from nsdray.targets.clip_tokens import unconditional_tokens


def random_model(device: str, dtype: torch.dtype) -> VersatileDiffusion:
    """The published architecture with small random weights, made without a float32 copy."""
    with torch.device("meta"):
        model = VersatileDiffusion(build_unet(PUBLISHED_UNET), AutoencoderKL.from_config(PUBLISHED_VAE), PUBLISHED_SCHEDULER)
    model = model.to(dtype).to_empty(device=device)
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return model.to(memory_format=torch.channels_last).eval().requires_grad_(False)


def measure(way: str, n_images: int, batch_size: int, n_steps: int) -> tuple[float, float]:
    """Seconds a picture and peak GiB."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    reference = way == "reference"
    dtype = torch.float16 if reference and device == "cuda" else torch.bfloat16
    batch_size = 1 if reference else batch_size
    model = random_model(device, dtype)
    torch.manual_seed(0)
    clip = CLIP(CLIPConfig.published()).to(device).eval().requires_grad_(False)
    vision, text = torch.randn(n_images, 257, 768), torch.randn(n_images, 77, 768)
    images = torch.rand(n_images, 3, 512, 512)
    once = unconditional_tokens(clip)

    def run(first: int, n: int, steps: int) -> None:
        rows = slice(first, first + n)
        unconditional = unconditional_tokens(clip) if reference else once
        # a schedule of which 3 in 4 steps are run
        model.generate(range(n), vision[rows], text[rows], unconditional, images[rows], n_steps=-(-4 * steps // 3))

    run(0, batch_size, 1)  # warm-up
    started = time.perf_counter()
    for first in range(0, n_images, batch_size):
        run(first, min(batch_size, n_images - first), n_steps)
    seconds = (time.perf_counter() - started) / n_images
    on_gpu = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    return seconds, on_gpu / 2**30 or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n-images", type=int, default=16 if on_gpu else 2)
    parser.add_argument("--batch-size", type=int, default=8 if on_gpu else 2, help="of nsdray's way")
    parser.add_argument("--n-steps", type=int, default=37 if on_gpu else 2, help="denoising steps that are run")
    arguments = parser.parse_args()
    batch_size = min(arguments.batch_size, arguments.n_images)
    where = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    print(f"Versatile Diffusion, 512 x 512, random weights, {where}, {arguments.n_images} pictures, {arguments.n_steps} steps")
    seconds = {}
    for way, label in (("reference", "one at a time"), ("nsdray", f"nsdray, batches of {batch_size}")):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            seconds[way], peak = pool.apply(measure, (way, arguments.n_images, batch_size, arguments.n_steps))
        print(f"  {label:24s} {seconds[way]:8.2f} s a picture   peak {peak:5.1f} GiB", flush=True)
    print(f"  ratio {seconds['reference'] / seconds['nsdray']:.2f}   (goal on a GPU: 3)")


if __name__ == "__main__":
    main()
