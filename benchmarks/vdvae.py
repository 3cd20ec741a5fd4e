"""Extraction and decoding with the full-size VDVAE, beside the way of Brain-Diffuser's scripts. Random weights.

    python benchmarks/vdvae.py                   # ImageNet-64 architecture; on two cores some ten minutes
    python benchmarks/vdvae.py --n-images 4

The scripts run all 75 layers, in fp32 and batches of 30, and keep 31; they encode the test images once more before they
decode. nsdray stops after the last wanted layer, decodes without encoding, and may use bf16. Prints images/s of each,
measured in one run with one network, the ratios, and the peak memory of the process so far.
"""
from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable

import torch

from nsdray.models.vdvae import VDVAE, VDVAEConfig

REFERENCE_BATCH, N_LAYERS = 30, 31


def rate(name: str, work: Callable[[torch.Tensor, list[int]], object], images: torch.Tensor, batch_size: int) -> float:
    """Images per second of work over batches; prints it with the peak memory so far."""
    if images.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    work(images[:1], [0])  # warm-up
    started = time.perf_counter()
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        work(batch, list(range(start, start + len(batch))))
    if images.is_cuda:
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() / 2**30
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    speed = len(images) / (time.perf_counter() - started)
    print(f"  {name:44s} {speed:8.3f} images/s   peak {peak:5.1f} GiB", flush=True)
    return speed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n-images", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=8, help="of nsdray's way")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = VDVAE(VDVAEConfig.imagenet64()).to(device).eval().requires_grad_(False)
    images = torch.rand(arguments.n_images, 3, 64, 64, device=device)
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"VDVAE, ImageNet-64 architecture, random weights, {where}, {arguments.n_images} images")

    def autocast(work):
        def wrapped(batch, seeds):
            with torch.autocast(device, torch.bfloat16):
                return work(batch, seeds)

        return wrapped

    def everything(batch, seeds):
        return model.encode(batch, seeds=seeds)

    def first_layers(batch, seeds):
        return model.encode(batch, N_LAYERS, seeds=seeds)

    latents = model.encode(images[:1], N_LAYERS, "mean")

    def decode(batch, seeds):
        return model.decode([z.expand(len(batch), -1, -1, -1) for z in latents], seeds)

    def encode_and_decode(batch, seeds):
        everything(batch, seeds)
        return decode(batch, seeds)

    print(f"extract {N_LAYERS} layers")
    reference = rate("all layers, fp32, batches of 30", everything, images, REFERENCE_BATCH)
    ours = rate("nsdray, fp32", first_layers, images, arguments.batch_size)
    bf16 = rate("nsdray, bf16", autocast(first_layers), images, arguments.batch_size)
    print(f"  ratio {ours / reference:.2f} (fp32), {bf16 / reference:.2f} (bf16)   (target: 3 on a CPU, 8 on a GPU)")
    print(f"decode from {N_LAYERS} layers")
    reference = rate("encoding first, fp32, batches of 30", encode_and_decode, images, REFERENCE_BATCH)
    ours = rate("nsdray, fp32", decode, images, arguments.batch_size)
    bf16 = rate("nsdray, bf16", autocast(decode), images, arguments.batch_size)
    print(f"  ratio {ours / reference:.2f} (fp32), {bf16 / reference:.2f} (bf16)")


if __name__ == "__main__":
    main()
