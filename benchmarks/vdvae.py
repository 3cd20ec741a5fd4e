"""Extraction and decoding with the full-size VDVAE, beside the way of Brain-Diffuser's scripts. Random weights.

    python benchmarks/vdvae.py                   # ImageNet-64 architecture; on two cores some ten minutes
    python benchmarks/vdvae.py --n-images 4

The scripts run all 75 layers, in fp32 and batches of 30, and keep 31; they encode the test images once more before they
decode. nsdray stops after the last wanted layer, decodes without encoding, keeps channels last and may use bf16. Each way
runs in its own process, one after the other, with the same weights and pictures. Prints images/s, the ratios, and each
way's peak memory (of the process, or of the GPU).
"""
from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from contextlib import nullcontext

import torch

from nsdray.models.vdvae import VDVAE, VDVAEConfig

N_LAYERS = 31
WAYS = {  # name: batch size (None: --batch-size), channels last, bf16
    "the scripts' way, fp32, batches of 30": (30, False, False),
    "nsdray, fp32": (None, True, False),
    "nsdray, bf16": (None, True, True),
}


def measure(task: str, way: str, n_images: int, batch_size: int) -> tuple[float, float]:
    """Images/s and peak GiB of one way of a task, "extract" or "decode"."""
    own_batch, channels_last, bf16 = WAYS[way]
    reference, batch_size = own_batch is not None, own_batch or batch_size
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = VDVAE(VDVAEConfig.imagenet64()).to(device).eval().requires_grad_(False)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    images = torch.rand(n_images, 3, 64, 64, device=device)
    latents = model.encode(images[:1], N_LAYERS, "mean")

    def work(batch: torch.Tensor, seeds: list[int]) -> None:
        if task == "extract" or reference:
            model.encode(batch, None if reference else N_LAYERS, seeds=seeds)
        if task == "decode":
            model.decode([z.expand(len(batch), -1, -1, -1) for z in latents], seeds)

    with torch.autocast(device, torch.bfloat16) if bf16 else nullcontext():
        work(images[:1], [0])  # warm-up
        started = time.perf_counter()
        for start in range(0, n_images, batch_size):
            batch = images[start : start + batch_size]
            work(batch, list(range(start, start + len(batch))))
        if device == "cuda":
            torch.cuda.synchronize()
    speed = n_images / (time.perf_counter() - started)
    on_gpu = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    return speed, on_gpu / 2**30 or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n-images", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=8, help="of nsdray's way")
    arguments = parser.parse_args()
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(f"VDVAE, ImageNet-64 architecture, random weights, {where}, {arguments.n_images} images")
    for task in ("extract", "decode"):
        print(f"{task} {N_LAYERS} layers" if task == "extract" else f"{task} from {N_LAYERS} layers")
        speeds = []
        for way in WAYS:
            with multiprocessing.get_context("spawn").Pool(1) as pool:  # a process of its own, for its own peak
                speed, peak = pool.apply(measure, (task, way, arguments.n_images, arguments.batch_size))
            print(f"  {way:40s} {speed:8.3f} images/s   peak {peak:5.1f} GiB", flush=True)
            speeds.append(speed)
        goal = "   (goal: 3 on a CPU, 8 on a GPU)" if task == "extract" else ""
        print(f"  ratio {speeds[1] / speeds[0]:.2f} (fp32), {speeds[2] / speeds[0]:.2f} (bf16){goal}")


if __name__ == "__main__":
    main()
