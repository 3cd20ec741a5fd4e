"""Scoring 982 pairs of pictures by the suite of Brain-Diffuser, beside the way of the reference scripts. Random weights.

    python benchmarks/evaluation.py                # features of 16 pairs, comparison of 982: some minutes on two cores
    python benchmarks/evaluation.py --n-pairs 982  # features of all, for machines with time or a GPU

The reference runs each network whole, a pass per metric, one picture at a time, keeps all features in memory and correlates all
rows of truth and prediction with each other in float64; pixel metrics are a loop over pictures. nsdray runs each network once per
picture, in batches, up to the last layer wanted, in shards; comparison is in blocks. Each way runs in its own process. Prints
seconds and peak memory of features (a pair), pixels (a pair) and comparison (982 pairs), and the ratio for 982 pairs.
"""
from __future__ import annotations

import argparse
import multiprocessing
import resource
import time

import numpy as np
import torch
from skimage.color import rgb2gray
from skimage.metrics import structural_similarity

from nsdray.metrics.identification import two_way
from nsdray.metrics.perceptual import compare, find_suite, passes, pixel_scores, prepare
from nsdray.metrics.table import N_IMAGES_BATCH
from nsdray.models.backbones import features, find_backbone, random_backbone

SUITE, N_TEST, N_BATCH = "brain_diffuser", 982, 16
SIZES = {"alexnet2": 139_968, "alexnet5": 43_264, "inception": 2048, "clip": 768, "effnet_b1_v1": 1280, "swav": 2048}


def pictures(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 425, 425, 3), np.uint8)


def reference_features(n: int, device: str) -> float:
    """A pass of the whole network per metric and picture."""
    seen, decoded, seconds = pictures(n, 0), pictures(n, 1), 0.0
    for metric in find_suite(SUITE):
        if metric.backbone is None:
            continue
        network = find_backbone(metric.backbone).build().eval().requires_grad_(False).to(device)
        kept, node = [], dict(network.named_modules())[metric.node]
        node.register_forward_hook(lambda _, __, out: kept.append(out.flatten(1).cpu().numpy()))  # noqa: B023
        started = time.perf_counter()
        for picture in (*seen, *decoded):
            whole = getattr(network, "encode_image", network)
            whole(prepare(picture[None], metric.preparation).to(device))
        seconds += time.perf_counter() - started
    return seconds / n


def nsdray_features(n: int, device: str) -> float:
    """A pass per network and picture, in batches."""
    seconds = 0.0
    for (name, preparation), metrics in passes(SUITE).items():
        network, nodes = random_backbone(name, device=device), [metric.node for metric in metrics]
        started = time.perf_counter()
        for seed in (0, 1):
            shard = pictures(n, seed)
            for start in range(0, n, N_BATCH):
                features(network, prepare(shard[start : start + N_BATCH], preparation), nodes)
        seconds += time.perf_counter() - started
    return seconds / n


def reference_pixels(n: int, device: str) -> float:
    """One pair after the other."""
    seen, decoded = (pictures(n, seed).astype(np.float64) / 255 for seed in (0, 1))
    started = time.perf_counter()
    for a, b in zip(seen, decoded):
        np.corrcoef(a.reshape(1, -1), b.reshape(1, -1))
        grey = rgb2gray(a), rgb2gray(b)
        for axis in (None, 1):  # in two dimensions, and column by column
            structural_similarity(*grey, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1.0,
                                  channel_axis=axis)  # fmt: skip
    return (time.perf_counter() - started) / n


def nsdray_pixels(n: int, device: str) -> float:
    seen, decoded = pictures(n, 0), pictures(n, 1)
    started = time.perf_counter()
    for start in range(0, n, N_IMAGES_BATCH):
        dict(pixel_scores(SUITE, seen[start : start + N_IMAGES_BATCH], decoded[start : start + N_IMAGES_BATCH]))
    return (time.perf_counter() - started) / n


def compared(way: str) -> float:
    """Seconds to compare the features of 982 pairs."""
    random, seconds = np.random.default_rng(0), 0.0
    for metric in find_suite(SUITE):
        if metric.backbone is None:
            continue
        truth = random.standard_normal((N_TEST, SIZES[metric.name.split("/")[1]]), np.float32)
        prediction = truth + random.standard_normal(truth.shape, np.float32)
        started = time.perf_counter()
        if way == "nsdray":
            compare(metric, truth, prediction)
        else:
            r = np.corrcoef(truth, prediction)[:N_TEST, N_TEST:]
            if metric.comparison == "two_way":
                ((r < np.diag(r)).sum(0) / (N_TEST - 1)).mean()
            else:
                (1 - np.diag(r)).mean()
        seconds += time.perf_counter() - started
    return seconds


PARTS = {("reference", "features"): reference_features, ("nsdray", "features"): nsdray_features,
         ("reference", "pixels"): reference_pixels, ("nsdray", "pixels"): nsdray_pixels}  # fmt: skip


def measure(way: str, part: str, n: int) -> tuple[float, float]:
    """Seconds, and peak GiB of the process."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    with torch.inference_mode():
        seconds = compared(way) if part == "comparison" else PARTS[way, part](n, device)
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n-pairs", type=int, default=N_TEST if torch.cuda.is_available() else 16)
    n = parser.parse_args().n_pairs
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(f"suite {SUITE}, random weights, {where}; features and pixels of {n} pairs, comparison of {N_TEST}")
    totals = {}
    for way in ("reference", "nsdray"):
        total = 0.0
        for part in ("features", "pixels", "comparison"):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                seconds, peak = pool.apply(measure, (way, part, n))
            total += seconds * (1 if part == "comparison" else N_TEST)
            unit = "s" if part == "comparison" else "s a pair"
            print(f"  {way:10s} {part:12s} {seconds:8.3f} {unit:9s} peak {peak:5.1f} GiB", flush=True)
        totals[way] = total
    ratio = totals["reference"] / totals["nsdray"]
    print(f"  all of {N_TEST} pairs: {totals['reference']:.0f} s and {totals['nsdray']:.0f} s, ratio {ratio:.2f}")
    random = np.random.default_rng(0)
    for n, n_features in ((N_TEST, 768), (N_TEST, 2048), (N_TEST, 139_968), (10_000, 768)):
        truth, noise = random.standard_normal((2, n, n_features), np.float32)
        noise += truth
        started = time.perf_counter()
        two_way(truth, noise)
        print(f"  two_way of {n} x {n_features}: {time.perf_counter() - started:.3f} s", flush=True)


if __name__ == "__main__":
    main()
