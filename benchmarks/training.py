"""GRU training throughput: streamed from Parquet through Ray Data, beside the same loop over tensors in memory.

    python benchmarks/training.py            # full-size rows: 15,724 voxels, 13,344 latents
    python benchmarks/training.py --n-images 1024 --n-voxels 1400

Prints samples per second of both, measured in turns in one run, and their ratio (the target is 0.8 or more).
"""
from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Iterator

import numpy as np
import torch

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
import ray  # noqa: E402

from nsdray.cluster.data import Source, TrainingStream  # noqa: E402
from nsdray.cluster.train import standardise  # noqa: E402
from nsdray.models.vdvae import VDVAEConfig  # noqa: E402
from nsdray.regressors.gru import GRURegressor  # noqa: E402
from nsdray.regressors.scaling import moments, zscore  # noqa: E402
from nsdray.stages import Part, layer_name  # noqa: E402
from nsdray.store import Store, table  # noqa: E402
from nsdray.training import LocalContext, TargetScale, _train_epoch, memory_batches  # noqa: E402

N_LAYERS, ROWS_PER_PART, BATCH_SIZE = 15, 512, 128


def write_data(root: str, n_images: int, n_voxels: int) -> tuple[Source, np.ndarray, np.ndarray]:
    """Random samples and targets in a store, and the same in memory."""
    store, random = Store(root), np.random.default_rng(0)
    shapes = VDVAEConfig.imagenet64().layer_shapes[:N_LAYERS]
    samples, targets = store.stage("samples", {}), store.stage("targets/vdvae", {})
    parts, betas, latents = Part.split(np.arange(n_images), ROWS_PER_PART), [], []
    for part in parts:
        n = len(part.image_ids)
        x = random.standard_normal((n, n_voxels), np.float32)
        layers = [random.standard_normal((n, *shape), np.float32).astype(np.float16) for shape in shapes]
        samples.write("train", part.name, table({"image_id": part.image_ids, "betas": x}), {})
        columns = {layer_name(i): z for i, z in enumerate(layers)}
        targets.write("train", part.name, table({"image_id": part.image_ids} | columns), {})
        betas.append(x)
        latents.append(np.concatenate([z.reshape(n, -1) for z in layers], 1))
    source = Source(samples, "train", targets, "train", parts, [layer_name(i) for i in range(N_LAYERS)])
    return source, np.concatenate(betas), np.concatenate(latents)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n-images", type=int, default=2048)
    parser.add_argument("--n-voxels", type=int, default=15_724)
    parser.add_argument("--n-epochs", type=int, default=4)
    arguments = parser.parse_args()
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    with tempfile.TemporaryDirectory() as root:
        source, betas, latents = write_data(root, arguments.n_images, arguments.n_voxels)
        mean, std = moments(betas)
        latents_mean, latents_std = moments(latents)
        scale = TargetScale(latents_mean, latents_std, torch.device("cpu"))
        model = GRURegressor(betas.shape[1], latents.shape[1])
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4)
        in_memory = memory_batches(torch.from_numpy(zscore(betas, mean, std)), torch.from_numpy(latents).float(), BATCH_SIZE, 0)
        stream = TrainingStream(source, np.array([], int), BATCH_SIZE, arguments.n_epochs + 1, 0)
        tensors = torch.from_numpy(mean), torch.from_numpy(std)

        def streamed(epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
            for x, y, n_global in stream(epoch):
                yield standardise(x, *tensors), y, n_global

        rates: dict[str, list[float]] = {"memory": [], "stream": []}
        for epoch in range(arguments.n_epochs + 1):  # the first is a warm-up
            for name, batches in (("memory", in_memory), ("stream", streamed)):
                metrics = _train_epoch(model, batches(epoch), optimiser, LocalContext(), scale, 1.0)
                if epoch:
                    rates[name].append(metrics["samples_per_s"])
        stream = None  # its Ray Data execution ends before Ray does
    ray.shutdown()
    memory, stream_rate = (statistics.median(rates[name]) for name in ("memory", "stream"))
    print(f"GRU, {betas.shape[1]:,} voxels, {latents.shape[1]:,} latents, batch {BATCH_SIZE}, {os.cpu_count()} cores, "
          f"median of {arguments.n_epochs} epochs of {arguments.n_images:,} images")  # fmt: skip
    print(f"  tensors in memory      {memory:8.0f} samples/s")
    print(f"  Parquet, Ray Data      {stream_rate:8.0f} samples/s")
    print(f"  ratio                  {stream_rate / memory:8.2f}   (target: 0.8 or more)")


if __name__ == "__main__":
    main()
