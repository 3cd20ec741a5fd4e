"""Extraction and decoding with the full-size VDVAE, beside the way of Brain-Diffuser's scripts. Random weights.

    python benchmarks/vdvae.py                          # ImageNet-64 architecture; on two idle cores some ten minutes
    python benchmarks/vdvae.py --n-images-decode 982    # a whole test set by nsdray's way
    python benchmarks/vdvae.py --n-images 8 --n-images-decode 8 --n-images-reference 2

The scripts run all 75 layers, in fp32 and batches of 30, and keep 31; they encode the test images once more before they
decode. nsdray stops after the last wanted layer, decodes without encoding, keeps channels last and may use bf16. Each way
runs in its own process, one after the other, with the same weights and pictures. A way's first batch, which is not timed, is
of the timed size; the scripts' way is timed on fewer pictures, since it takes so much longer. On a GPU, fp32 is TF32 within
the convolutions of the scripts' way, as PyTorch has it by default, and is not for nsdray. Prints images/s, the ratios, each
way's peak memory (of the process, or of the GPU), and what bf16 alters.
"""
from __future__ import annotations

import argparse
import multiprocessing
import resource
import time

import torch

from nsdray.cluster.actors import fitting_batch_size, memory_share, precision, vdvae_bytes
from nsdray.mini import weights_path
from nsdray.models.batching import padded_batches
from nsdray.models.vdvae import VDVAE, VDVAEConfig, load_vdvae

N_LAYERS = 31
REFERENCE = "the scripts' way, fp32, batches of 30"
WAYS = {REFERENCE: "float32", "nsdray, fp32": "float32", "nsdray, bf16": "bfloat16"}


def find_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def full_size(device: str) -> VDVAE:
    """ImageNet-64 architecture, random weights, the same each time."""
    torch.manual_seed(0)
    return VDVAE(VDVAEConfig.imagenet64()).to(device).eval().requires_grad_(False)


def measure(task: str, way: str, n_images: int, batch_size: int) -> tuple[float, float]:
    """Images/s and peak GiB of one way of a task, "extract" or "decode". The last batch is padded, as in a run."""
    reference, device = way == REFERENCE, find_device()
    torch.backends.cudnn.allow_tf32 = reference
    model = full_size(device)
    if not reference:
        model = model.to(memory_format=torch.channels_last)
    images = torch.rand(n_images, 3, 64, 64)
    latents = model.encode(images[:1], N_LAYERS, "mean")

    def work(rows: list[int]) -> None:
        if task == "extract" or reference:
            model.encode(images[rows], None if reference else N_LAYERS, seeds=rows)
        if task == "decode":
            model.decode([z.expand(len(rows), -1, -1, -1) for z in latents], rows)
        if device == "cuda":
            torch.cuda.synchronize()

    batches = [rows.tolist() for rows, _ in padded_batches(n_images, batch_size)]
    with precision(device, WAYS[way]):
        work(batches[0])  # warm-up
        started = time.perf_counter()
        for rows in batches:
            work(rows)
    speed = n_images / (time.perf_counter() - started)
    on_gpu = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    return speed, on_gpu / 2**30 or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def bf16_differences(model: VDVAE, n_images: int = 4) -> str:
    """How far bf16 is from fp32, on random pictures: posterior means of 31 layers, and pixels from the same latents and draws."""
    torch.backends.cudnn.allow_tf32 = False
    device, size, seeds = model.device.type, model.config.image_size, list(range(n_images))
    images = torch.rand(n_images, 3, size, size, generator=torch.Generator().manual_seed(0))
    exact = model.encode(images, N_LAYERS, "mean")
    pictures = model.decode(exact, seeds)
    with precision(device, "bfloat16"):
        coarse, coarse_pictures = model.encode(images, N_LAYERS, "mean"), model.decode(exact, seeds)
    largest = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(coarse, exact))
    coarse, exact = (torch.cat([z.flatten() for z in layers]).double() for layers in (coarse, exact))
    rms = ((coarse - exact).square().mean() / exact.square().mean()).sqrt().item()
    levels = (coarse_pictures.int() - pictures.int()).abs()
    near, most = (levels <= 1).float().mean(), levels.max()
    return (f"posterior means {rms:.2%} (rms), {largest:.2%} (largest, of the layer's largest value); pixels within one grey "
            f"level {near:.2%}, largest difference {most}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n-images", type=int, default=128, help="to extract by nsdray's ways")
    parser.add_argument("--n-images-decode", type=int, default=64, help="to decode by nsdray's ways")
    parser.add_argument("--n-images-reference", type=int, default=30, help="for both tasks, by the scripts' way")
    parser.add_argument("--batch-size", type=int, help="of nsdray's ways; default: as in a run")
    arguments = parser.parse_args()
    device = find_device()
    fitting = fitting_batch_size(vdvae_bytes(VDVAEConfig.imagenet64()), memory_share(device, 1.0))
    batch_size = arguments.batch_size or fitting
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"VDVAE, ImageNet-64 architecture, random weights, {where}, nsdray in batches of {batch_size}")
    for task, n_images in {"extract": arguments.n_images, "decode": arguments.n_images_decode}.items():
        print(f"{task} {N_LAYERS} layers" if task == "extract" else f"{task} from {N_LAYERS} layers")
        speeds = []
        for way in WAYS:
            n, size = (arguments.n_images_reference, 30) if way == REFERENCE else (n_images, batch_size)
            with multiprocessing.get_context("spawn").Pool(1) as pool:  # a process of its own, for its own peak
                speed, peak = pool.apply(measure, (task, way, n, min(n, size)))
            print(f"  {way:40s} {speed:8.3f} images/s   peak {peak:5.1f} GiB   {n} images", flush=True)
            speeds.append(speed)
        goal = "   (goal: 3 on a CPU, 8 on a GPU)" if task == "extract" else ""
        print(f"  ratio {speeds[1] / speeds[0]:.2f} (fp32), {speeds[2] / speeds[0]:.2f} (bf16){goal}")
    mini = load_vdvae(weights_path("vdvae"), VDVAEConfig.mini(), device)
    print("bf16 beside fp32, random pictures")
    for name, model in {"full size, random weights": full_size(device), "mini, trained": mini}.items():
        print(f"  {name}: {bf16_differences(model)}", flush=True)


if __name__ == "__main__":
    main()
