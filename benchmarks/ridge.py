"""Ridge for all 347,680 targets of a subject (31 VDVAE layers, 257 vision, 77 text tokens) beside scikit-learn's, fit by fit.

    python benchmarks/ridge.py                   # full size: 8,859 x 15,724 betas, 982 test images; 12 GB of disk, 13 minutes
    python benchmarks/ridge.py --fraction 0.1    # a tenth of the columns; what they take is scaled up, and said so
    python benchmarks/ridge.py --scale 0.15      # of the images, voxels and test images, for a look

Writes synthetic betas (float32) and targets (float16) as nsdray's Parquet to a temporary folder, then measures, one after the
other:

- nsdray: `nsdray.cluster.ridge.fit_ridges`, as the jobs call it, on a Ray cluster started for it (workers are there, with their
  imports): from reading the betas to the test predictions on disk, with the errors and R2 that the report has. For the
  predictions alone (no leave-one-out, no weights), with the moments of leave-one-out predictions of as many training images,
  and by default: with moments, and with what decoding new images to VDVAE latents needs;
- scikit-learn's Ridge as Brain-Diffuser uses it: one fit to a token's 768 targets and its test predictions, from arrays in
  memory, times 335 (a fit per token and one for the VDVAE, whose 91,168 targets would take longer);
- himalaya's KernelRidge on the same token, in float32 (its eigendecomposition would serve further tokens, too);
- this machine's matrix products. The floor is the number of operations that nsdray's way needs, at that rate.

Prints seconds, ratios, peak memory (proportional shares of this process, Ray's and all workers, the object store in them, every
half second; and what they had before), and how far predictions of a token are off scikit-learn's in float64, relative to their
standard deviation. Fails where that is above 1e-3.
"""
from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import psutil
import ray
import torch
from safetensors.numpy import load

from nsdray.cluster import ridge
from nsdray.cluster.data import read_samples, read_targets
from nsdray.config import RidgeConfig
from nsdray.nsd.rois import Voxels
from nsdray.recipes import ridge_31
from nsdray.regressors.linalg import find_device
from nsdray.regressors.scaling import moments, zscore
from nsdray.stages import Fit, Plan, SubjectPlan
from nsdray.store import Store, table, view_column

ALPHA, TOKEN_WIDTH, N_FITS, TOLERANCE = 50_000.0, 768, 335, 1e-3
TOKEN = "token_000"
"""Of clip_vision: the token that everybody fits."""
RUNS = {
    "predictions alone": ({"rescale": "none", "held_out": "none", "weights": "none"}, 80),
    "with moments": ({"weights": "none"}, 50),
    "by default (with weights)": ({}, None),
}
"""Settings of ridge, and how many times as fast as scikit-learn it should be in float64."""


@dataclass(frozen=True)
class Sizes:
    n_train: int
    n_test: int
    n_voxels: int


class Subject(SubjectPlan):
    """A subject of these sizes, without files of NSD."""

    def __init__(self, plan: Plan, sizes: Sizes):
        super().__init__(plan, 1)
        self.sizes, self.inputs = sizes, {}
        self.voxels = Voxels(np.arange(sizes.n_voxels), (sizes.n_voxels, 1, 1), [""] * sizes.n_voxels, None)

    def image_ids(self, split: str) -> np.ndarray:
        n, m = self.sizes.n_train, self.sizes.n_test
        return np.arange(n, dtype=np.int32) if split == "train" else np.arange(n, n + m, dtype=np.int32)


class SyntheticPlan(Plan):
    """Ridge for all kinds of targets, or for a fraction of their columns, below a folder."""

    def __init__(self, folder: str, sizes: Sizes, fraction: float = 1.0, **settings: object):
        config = ridge_31()
        self.config = replace(config, ridge=RidgeConfig(**settings), data=replace(config.data, subjects=(1,)))
        self.store, self.is_simulated, self.fraction = Store(folder), False, fraction
        self.samples, self.vdvae_sha256, self.clip_sha256 = self.store.stage("samples", {}), "", ""
        self.subjects = [Subject(self, sizes)]
        self.shared_images = self.subjects[0].image_ids("test")

    def chosen(self, kind: str) -> list[int]:
        """Indices of the columns: evenly chosen, the first one always."""
        n = len(super().columns(kind))
        return np.linspace(0, n - 1, max(1, round(self.fraction * n))).round().astype(int).tolist()

    def columns(self, kind: str) -> list[str]:
        return [super(SyntheticPlan, self).columns(kind)[i] for i in self.chosen(kind)]

    def shapes(self, kind: str) -> list[tuple[int, ...]]:
        if kind != "vdvae":
            return super().shapes(kind)  # as many as columns
        return [super(SyntheticPlan, self).shapes(kind)[i] for i in self.chosen(kind)]

    def n_targets(self, kinds: tuple[str, ...] | None = None) -> int:
        return sum(int(np.prod(shape)) for kind in kinds or self.kinds for shape in self.shapes(kind))


# Data.


def write_data(plan: SyntheticPlan) -> None:
    """Betas that share some variance, as those of neighbouring voxels do; targets from a pool of normal numbers."""
    random, [subject] = np.random.default_rng(0), plan.subjects
    shared = random.standard_normal((40, subject.sizes.n_voxels), np.float32)
    pool = random.standard_normal(1 << 24, np.float32).astype(np.float16)

    def betas(n: int) -> np.ndarray:
        common = random.standard_normal((n, 40), np.float32) @ shared * 0.2
        return random.standard_normal((n, subject.sizes.n_voxels), np.float32) + common

    def targets(n: int, shape: tuple[int, ...]) -> np.ndarray:
        size = n * int(np.prod(shape))
        start = int(random.integers(len(pool) - size))
        return pool[start : start + size].reshape(n, *shape)

    for split in ("train", "test"):
        for part in subject.parts(split):
            n, ids = len(part.image_ids), {"image_id": part.image_ids}
            plan.samples.write(subject.samples(split), part.name, table(ids | {"betas": betas(n)}), {})
            for kind in plan.kinds:
                data = {name: targets(n, shape) for name, shape in zip(plan.columns(kind), plan.shapes(kind))}
                plan.targets(kind).write(subject.targets(split), part.name, table(ids | data), {})


def predicted(plan: SyntheticPlan) -> np.ndarray:
    """What was written for the token's test images, before it was rescaled, (n_test, TOKEN_WIDTH)."""
    [subject], fit = plan.subjects, Fit("ridge", "clip_vision")
    stage = plan.predictions(fit)
    found = np.concatenate([view_column(stage.read(subject.folder, p.name, [TOKEN]), TOKEN) for p in subject.parts("test")])
    if plan.config.ridge.rescale == "none":
        return found
    scaling = load(plan.store.read_bytes(f"{plan.model(fit).folder}/{subject.folder}/scaling.safetensors"))
    mean, std, to_mean, to_std = (scaling[name][:TOKEN_WIDTH].astype(np.float64) for name in
                                  ("predictions_mean", "predictions_std", "latents_mean", "latents_std"))  # fmt: skip
    return (found - to_mean) / to_std * std + mean


# Measuring.


class Memory(threading.Thread):
    """Watches this process and all that it started."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self._over = 0.0, threading.Event()

    def run(self) -> None:
        while True:
            self.peak = max(self.peak, shared_bytes())
            if self._over.wait(1.0):
                break

    def stop(self) -> float:
        """Largest sum, in bytes."""
        self._over.set()
        self.join()
        return self.peak


def shared_bytes() -> float:
    """Proportional set sizes of this process and of all below it: shared memory counts once."""
    total = 0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            with open(f"/proc/{process.pid}/smaps_rollup") as file:
                total += next(int(line.split()[1]) * 1024 for line in file if line.startswith("Pss:"))
        except (OSError, StopIteration):  # it has ended
            continue
    return total


@ray.remote(num_cpus=1)
def import_all() -> None:
    """Makes a worker import what the tasks need."""
    import nsdray.cluster.ridge  # noqa: F401

    time.sleep(1)


def measure_nsdray(plan: SyntheticPlan) -> dict:
    """Seconds, peak memory and that before, in bytes, and the token's predictions. What was written is removed."""
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        ray.get([import_all.remote() for _ in range(os.cpu_count())])
        before, memory = shared_bytes(), Memory()
        memory.start()
        started = time.perf_counter()
        ridge.fit_ridges({plan.subjects[0]: plan.fits})
        seconds = time.perf_counter() - started
        found = {"seconds": seconds, "peak": memory.stop(), "before": before, "checked": predicted(plan)}
    finally:
        ray.shutdown()
        for name in ("models", "predictions"):
            shutil.rmtree(f"{plan.store.root}/{name}", ignore_errors=True)
    return found


def measure_one_fit(plan: SyntheticPlan, dtype: str, library: str) -> dict:
    """Seconds of a fit to one token and its test predictions, arrays in memory."""
    [subject] = plan.subjects
    (_, train), (_, test) = (read_samples(subject, split) for split in ("train", "test"))
    scale = moments(train)
    train, test = (zscore(betas, *scale).astype(dtype) for betas in (train, test))
    targets = read_targets(subject, "train", [TOKEN], "clip_vision").astype(dtype)
    if library == "scikit-learn":
        from sklearn.linear_model import Ridge

        model, mean = Ridge(alpha=ALPHA), 0
    else:
        from himalaya.kernel_ridge import KernelRidge

        model, mean = KernelRidge(alpha=ALPHA, kernel="linear"), targets.mean(0)  # it has no intercept
    memory = Memory()
    memory.start()
    started = time.perf_counter()
    checked = model.fit(train, targets - mean).predict(test) + mean
    return {"seconds": time.perf_counter() - started, "checked": checked, "peak": memory.stop()}


def measure_rate(sizes: Sizes, dtype: str) -> dict:
    """Matrix products of a block's shape, operations per second: the best of five by NumPy, and by torch (on a GPU, if any)."""
    random = np.random.default_rng(0)
    a, b = (random.standard_normal(shape).astype(dtype) for shape in ((sizes.n_test, sizes.n_train), (sizes.n_train, 2048)))
    device = find_device() or "cpu"
    x, y = torch.from_numpy(a).to(device), torch.from_numpy(b).to(device)

    def by_torch() -> None:
        torch.matmul(x, y)
        if device == "cuda":
            torch.cuda.synchronize()

    def best(product: Callable[[], object]) -> float:
        seconds = []
        for _ in range(6):
            started = time.perf_counter()
            product()
            seconds.append(time.perf_counter() - started)
        return 2 * sizes.n_test * sizes.n_train * 2048 / min(seconds[1:])

    return {"NumPy": best(lambda: a @ b), f"torch on {device}": best(by_torch)}


def operations(plan: SyntheticPlan) -> float:
    """Of the products that nsdray's way cannot do without; a multiplication and an addition count as two."""
    sizes, config = plan.subjects[0].sizes, plan.config.ridge
    n, p, m = sizes.n_train, sizes.n_voxels, sizes.n_test
    once = n * n * p + n**3 / 3 + 2 * m * n * p  # half of X X', Cholesky, test kernel
    basis = 2 * n * n * p if config.weights != "none" else 0
    return once + basis + (1 if config.held_out == "none" else 2) * (2 * m * n * n + 2 * m * n * plan.n_targets())


def apart(function: Callable[..., dict], *arguments: object) -> dict:
    """Its result in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def difference(ours: np.ndarray, reference: np.ndarray) -> float:
    """Largest difference, relative to the reference's standard deviation."""
    return float(np.abs(ours - reference).max() / reference.std())


def line(what: str, found: dict, note: str) -> None:
    before = f" ({found['before'] / 1e9:.2f} before)" if "before" in found else ""
    print(f"  {what:50s}{found['seconds']:8.1f} s   peak {found['peak'] / 1e9:5.2f} GB{before}   {note}", flush=True)


def compare(folder: str, sizes: Sizes, dtype: str, fraction: float, exact: dict) -> list[float]:
    """Print everything in one precision; how far nsdray's predictions are off. exact: scikit-learn's fit in float64."""
    rates = apart(measure_rate, sizes, dtype)
    print(f"{dtype}: matrix products by " + ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in rates.items()))
    plan, found = SyntheticPlan(folder, sizes), {"scikit-learn": exact}
    if dtype != "float64":
        found = {name: apart(measure_one_fit, plan, dtype, name) for name in ("scikit-learn", "himalaya")}
    for name, single in found.items():
        note = f"off by {difference(single['checked'], exact['checked']):.1e}"
        line(f"{name}'s ridge, a token", single, note)
    print(f"  scikit-learn's, times {N_FITS}: {found['scikit-learn']['seconds'] * N_FITS:.0f} s")
    slow, off = found["scikit-learn"]["seconds"] * N_FITS, []
    for name, (settings, goal) in RUNS.items():
        if goal is None and dtype == "float64":
            continue
        own, full = (SyntheticPlan(folder, sizes, part, dtype=dtype, **settings) for part in (fraction, 1.0))
        ours, scaled = measure_nsdray(own), operations(full) / operations(own)
        off.append(difference(ours["checked"], exact["checked"]))
        note = f"off by {off[-1]:.1e}" + (f"; {own.n_targets():,} targets, scaled up by {scaled:.2f}" if fraction < 1 else "")
        seconds, floor = ours["seconds"] * scaled, operations(full) / max(rates.values())
        line(f"nsdray, all targets, {name}", ours | {"seconds": seconds}, note)
        wanted = f" (goal: {goal})" if goal and dtype == "float64" else ""
        print(f"    {slow / seconds:.0f} times as fast as scikit-learn in {dtype}{wanted}; "
              f"{exact['seconds'] * N_FITS / seconds:.0f} times as in float64")  # fmt: skip
        print(f"    {seconds / floor:.2f} times the floor (goal: 1.5), {floor:.1f} s for {operations(full) / 1e12:.1f} TFLOP",
              flush=True)  # fmt: skip
    return off


def disk_bytes(plan: SyntheticPlan) -> int:
    """What is on disk at once at most: betas, targets, predictions, and the VDVAE's weights."""
    s, n_targets = plan.subjects[0].sizes, plan.n_targets()
    data = (s.n_train + s.n_test) * (4 * s.n_voxels + 2 * n_targets) + 4 * s.n_test * n_targets
    return data + 2 * s.n_train * plan.n_targets(("vdvae",)) + 4 * s.n_train * s.n_voxels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fraction", type=float, default=1.0, help="of the columns of targets")
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of images and voxels")
    parser.add_argument("--folder", default=None, help="where to put the temporary folder")
    arguments = parser.parse_args()
    sizes, started = Sizes(*(max(2, round(arguments.scale * size)) for size in (8859, 982, 15_724))), time.perf_counter()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        plan = SyntheticPlan(folder, sizes)
        free, n_bytes = shutil.disk_usage(folder).free, 1.05 * disk_bytes(plan)
        if free < n_bytes:
            raise SystemExit(f"{folder} has {free / 1e9:.1f} GB free, but needs {n_bytes / 1e9:.1f} GB: choose a --folder")
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"
        print(f"Ridge, {device}: {sizes.n_train:,} x {sizes.n_voxels:,} betas, {plan.n_targets():,} targets, {sizes.n_test} test "
              "images", flush=True)  # fmt: skip
        apart(write_data, plan)
        exact = apart(measure_one_fit, plan, "float64", "scikit-learn")
        off = [compare(folder, sizes, dtype, arguments.fraction, exact) for dtype in ("float64", "float32")]
    worst = max(sum(off, []))
    print(f"{time.perf_counter() - started:.0f} s in all; predictions are off by at most {worst:.1e}")
    if not worst <= TOLERANCE:
        raise SystemExit(f"predictions are off scikit-learn's by {worst:.1e} of their deviation, more than {TOLERANCE:g}")


if __name__ == "__main__":
    main()
