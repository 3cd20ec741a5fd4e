"""GRU training throughput: streamed from Parquet through Ray Data, beside the same loop over tensors in memory.

    python benchmarks/training.py            # full size: 8,859 images, 15,724 voxels, 13,344 latents
    python benchmarks/training.py --n-images 1024 --n-voxels 1400

Prints samples per second of both, measured in one run, and their ratio (the target is 0.8 or more): epochs over memory before
and after those of the stream, which reads ahead and must not be there meanwhile. Then the seconds to the first batch of two
trials that share their data through the object store; before the second, the files are deleted.
"""
from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator

import numpy as np
import torch

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
import ray  # noqa: E402

from nsdray.cluster.data import SharedArrays, Source, TrainingStream, share_arrays, steps_per_epoch  # noqa: E402
from nsdray.cluster.train import standardise  # noqa: E402
from nsdray.models.vdvae import VDVAEConfig  # noqa: E402
from nsdray.regressors.gru import GRURegressor  # noqa: E402
from nsdray.regressors.scaling import moments, zscore  # noqa: E402
from nsdray.stages import Part, layer_name  # noqa: E402
from nsdray.store import Store, table  # noqa: E402
from nsdray.training import Batches, LocalContext, TargetScale, _train_epoch, memory_batches  # noqa: E402

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


@ray.remote(num_cpus=1)
def first_batch(shared: SharedArrays, columns: list[str]) -> int:
    """A trial up to its first batch; its rows."""
    arrays = shared.get(columns)
    return next(iter(memory_batches(arrays.betas, arrays.targets, BATCH_SIZE, 0)(0)))[2]


def trial_starts(source: Source, root: str) -> list[float]:
    """Seconds to the first batch of a trial that reads the data and of one that finds them; between them, the files go."""
    seconds, shared = [], None
    for _ in range(2):
        started = time.perf_counter()
        shared = shared or share_arrays(source, source.parts[0].image_ids[:128])
        assert ray.get(first_batch.remote(shared, source.columns)) > 0
        seconds.append(time.perf_counter() - started)
        shutil.rmtree(root)
        os.mkdir(root)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n-images", type=int, default=8859)
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
        n_steps = steps_per_epoch([arguments.n_images], BATCH_SIZE, 1)
        tensors = torch.from_numpy(mean), torch.from_numpy(std)

        def streamed() -> Batches:
            stream = TrainingStream(source, np.array([], int), n_steps, arguments.n_epochs + 1, 0)

            def batches(epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
                for x, y, n_global in stream(epoch):
                    yield standardise(x, tensors), y, n_global

            return batches

        def rates(batches: Batches) -> list[float]:
            """Samples per second of each epoch but the first, which is a warm-up."""
            epochs = range(arguments.n_epochs + 1)
            return [_train_epoch(model, batches(epoch), optimiser, LocalContext(), scale, 1.0)["samples_per_s"]
                    for epoch in epochs][1:]  # fmt: skip

        in_memory_rates = rates(in_memory)
        stream_rate = statistics.median(rates(streamed()))  # it ends with the stream's last epoch
        memory = statistics.median(in_memory_rates + rates(in_memory))
        first, second = trial_starts(source, root)
    ray.shutdown()
    print(f"GRU, {betas.shape[1]:,} voxels, {latents.shape[1]:,} latents, batch {BATCH_SIZE}, {os.cpu_count()} cores, "
          f"medians of {2 * arguments.n_epochs} and {arguments.n_epochs} epochs of {arguments.n_images:,} images")  # fmt: skip
    print(f"  tensors in memory      {memory:8.0f} samples/s")
    print(f"  Parquet, Ray Data      {stream_rate:8.0f} samples/s")
    print(f"  ratio                  {stream_rate / memory:8.2f}   (target: 0.8 or more)")
    print("seconds to the first batch of a trial on these data, shared through the object store")
    print(f"  first trial            {first:8.2f}   (reads them)")
    print(f"  second trial           {second:8.2f}   (the files are gone)")


if __name__ == "__main__":
    main()
