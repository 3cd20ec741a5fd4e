"""Ridge for all 347,680 targets of a subject (31 VDVAE layers, 257 vision, 77 text tokens) beside scikit-learn's, fit by fit.

    python benchmarks/ridge.py                   # full size: 8,859 x 15,724 betas, 982 test images; 8 GB of disk, some 15 minutes
    python benchmarks/ridge.py --fraction 0.1    # a tenth of the blocks of targets; what they take is scaled up, and said so
    python benchmarks/ridge.py --scale 0.1       # a tenth of the images, voxels and test images, for a look

Writes synthetic betas (float32) and targets (float16) as nsdray's Parquet to a temporary folder, then measures, each in a
process of its own, one after the other:

- nsdray, in float64 and float32: everything from reading the betas to test predictions on disk (float32), targets read from
  Parquet; for the predictions alone, and with the moments of leave-one-out predictions of as many training images;
- scikit-learn's Ridge as Brain-Diffuser uses it: one fit to a token's 768 targets and its test predictions, from arrays in
  memory, times 335 (a fit per token and one for the VDVAE, whose 91,168 targets would take longer);
- himalaya's KernelRidge on the same token, if it is installed, and nsdray on the same token;
- this machine's matrix products. The floor is the number of operations that nsdray's way needs, at that rate.

Prints seconds (without imports), ratios, peak memory (of all processes that share the targets, together), and how far
predictions of a token are off scikit-learn's in float64, relative to their standard deviation.
"""
from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import numpy as np
import torch

from nsdray.cluster.data import read_columns
from nsdray.cluster.ridge_factors import N_TARGETS_BLOCK, equal_shares, pieces_of
from nsdray.models.vdvae import VDVAEConfig
from nsdray.regressors.linalg import Scratch, find_device
from nsdray.regressors.ridge import ridge_kernel
from nsdray.regressors.ridge_grid import Smoothers, ahead, fit_block, make_smoothers
from nsdray.regressors.scaling import moments, zscore
from nsdray.regressors.target_blocks import TargetBlock, centre_targets
from nsdray.stages import Part, layer_name, token_names
from nsdray.store import Stage, Store, table, view_column

ALPHA, ROWS_PER_PART, TOKEN_WIDTH, N_FITS = 50_000.0, 512, 768, 335
CHECKED = "token_000"
"""Of clip_vision: the token that everybody fits."""


@dataclass(frozen=True)
class Sizes:
    n_train: int
    n_test: int
    n_voxels: int

    @property
    def parts(self) -> list[Part]:
        return Part.split(np.arange(self.n_train), ROWS_PER_PART)


def columns_of() -> dict[str, dict[str, tuple[int, ...]]]:
    """Shape of a cell of every column, by kind."""
    layers = VDVAEConfig.imagenet64().layer_shapes[:31]
    return {
        "vdvae": {layer_name(i): shape for i, shape in enumerate(layers)},
        "clip_vision": dict.fromkeys(token_names(257), (TOKEN_WIDTH,)),
        "clip_text": dict.fromkeys(token_names(77), (TOKEN_WIDTH,)),
    }


N_TARGETS = sum(int(np.prod(shape)) for columns in columns_of().values() for shape in columns.values())


def stage_of(folder: str, name: str) -> Stage:
    return Store(folder).stage(name, {})


def write_data(folder: str, sizes: Sizes) -> dict:
    """Betas that share some variance, as those of neighbouring voxels do; targets from a pool of normal numbers."""
    random = np.random.default_rng(0)
    shared = random.standard_normal((40, sizes.n_voxels), np.float32)
    pool = random.standard_normal(1 << 24, np.float32).astype(np.float16)

    def betas(n: int) -> np.ndarray:
        common = random.standard_normal((n, 40), np.float32) @ shared * 0.2
        return random.standard_normal((n, sizes.n_voxels), np.float32) + common

    def targets(n: int, shape: tuple[int, ...]) -> np.ndarray:
        size = n * int(np.prod(shape))
        start = int(random.integers(len(pool) - size))
        return pool[start : start + size].reshape(n, *shape)

    for part in sizes.parts:
        n = len(part.image_ids)
        stage_of(folder, "samples").write("train", part.name, table({"image_id": part.image_ids, "betas": betas(n)}), {})
        for kind, columns in columns_of().items():
            data = {name: targets(n, shape) for name, shape in columns.items()}
            stage_of(folder, f"targets/{kind}").write("train", part.name, table({"image_id": part.image_ids} | data), {})
    ids = np.arange(sizes.n_test)
    stage_of(folder, "samples").write("test", "part-0000.parquet", table({"image_id": ids, "betas": betas(len(ids))}), {})
    return {}


def read_betas(folder: str, sizes: Sizes) -> tuple[np.ndarray, np.ndarray]:
    """z-scored training and test betas, float32, without second copies."""
    stage, start = stage_of(folder, "samples"), 0
    train = np.empty((sizes.n_train, sizes.n_voxels), np.float32)
    for part in sizes.parts:
        train[start : start + len(part.image_ids)] = view_column(stage.read("train", part.name, ["betas"]), "betas")
        start += len(part.image_ids)
    test = np.array(view_column(stage.read("test", "part-0000.parquet", ["betas"]), "betas"))
    scale = moments(train)
    for betas in (train, test):
        for first in range(0, len(betas), ROWS_PER_PART):
            betas[first : first + ROWS_PER_PART] = zscore(betas[first : first + ROWS_PER_PART], *scale)
    return train, test


def blocks(fraction: float) -> list[tuple[str, list[str]]]:
    """Columns in blocks of at least N_TARGETS_BLOCK targets; a fraction of them, evenly chosen, the checked token's first."""
    found: list[tuple[str, list[str]]] = []
    for kind, columns in columns_of().items():
        n = N_TARGETS_BLOCK
        for name, shape in columns.items():
            if n >= N_TARGETS_BLOCK:
                found.append((kind, []))
                n = 0
            found[-1][1].append(name)
            n += int(np.prod(shape))
    found.sort(key=lambda block: CHECKED not in block[1] or block[0] != "clip_vision")
    return [found[i] for i in np.linspace(0, len(found) - 1, max(1, round(fraction * len(found)))).round().astype(int)]


def size_of(kind: str, names: list[str]) -> int:
    return sum(int(np.prod(columns_of()[kind][name])) for name in names)


def measure_nsdray(folder: str, sizes: Sizes, dtype: str, with_moments: bool, fraction: float, token_only: bool) -> dict:
    """Seconds before the targets, seconds for them, how many they were, and the workers' peak memory.

    As on a cluster: betas, kernel and factor by one process with all CPUs, then blocks of targets by workers with one CPU (or by
    this process, if there is a GPU, or for one token).
    """
    alone = token_only or find_device() is not None
    os.environ["OMP_NUM_THREADS"] = "1"  # of the workers; this process has read it already
    with nullcontext() if alone else multiprocessing.get_context("spawn").Pool(min(8, os.cpu_count())) as pool:
        if pool:
            pool.map(time.sleep, [1.0] * pool._processes, 1)  # imports are not counted
        started = time.perf_counter()
        prepare(folder, sizes, dtype, with_moments)
        prepared = time.perf_counter()
        todo = [("clip_vision", [CHECKED])] if token_only else blocks(fraction)
        n = 1 if alone else 4 * pool._processes
        targets = [size_of(*block) for block in todo]
        shares = [(folder, sizes, dtype, with_moments, todo[share]) for share in equal_shares(targets, n)]
        found = [solve_blocks(*shares[0])] if alone else pool.starmap(solve_blocks, shares, 1)
    merged = {"before": prepared - started, "targets": time.perf_counter() - prepared, "checked": found[0]["checked"]}
    peaks: dict[int, float] = {}
    for own in found:
        peaks[own["pid"]] = max(peaks.get(own["pid"], 0), own["peak"])
    return merged | {"n_targets": sum(own["n_targets"] for own in found), "workers": sum(peaks.values())}


def prepare(folder: str, sizes: Sizes, dtype: str, with_moments: bool) -> None:
    """From betas to smoothers, in files that the workers map."""
    train, test = read_betas(folder, sizes)
    rows = np.linspace(0, sizes.n_train - 1, sizes.n_test).astype(int) if with_moments else []
    kernel = ridge_kernel(train, dtype=np.dtype(dtype), device=find_device())
    smoothers = make_smoothers([kernel.factorise(ALPHA, overwrite=True)], test, rows).to(None)
    for name in ("rows", "held_out", "test"):
        np.save(Path(folder) / f"{name}.npy", getattr(smoothers, name))


def solve_blocks(folder: str, sizes: Sizes, dtype: str, with_moments: bool, todo: list[tuple[str, list[str]]]) -> dict:
    """Predictions of some blocks of columns, to a file."""
    device, parts = find_device(), [part.name for part in sizes.parts]
    arrays = (np.load(Path(folder) / f"{name}.npy", mmap_mode="r") for name in ("rows", "held_out", "test"))
    smoothers, n_targets, checked = Smoothers((ALPHA,), *arrays).to(device), 0, None

    def blocks_read() -> Iterator[tuple[bool, np.ndarray]]:
        for (kind, names), memory in zip(todo, cycle((Scratch(), Scratch()))):
            half = read_columns(stage_of(folder, f"targets/{kind}"), "train", parts, names, sizes.n_train, memory)
            yield kind == "clip_vision" and names[0] == CHECKED, half

    def pieces() -> Iterator[tuple[bool, TargetBlock]]:
        scratch = Scratch()
        for is_checked, half in ahead(blocks_read()):
            for own in pieces_of(half.shape[1]):
                yield is_checked and own.start == 0, centre_targets(half[:, own], np.dtype(dtype), device, scratch=scratch)

    with open(Path(folder) / f"predictions-{os.getpid()}.bin", "ab") as file:
        for is_checked, block in pieces():
            fitted = fit_block(smoothers, block)
            predictions = fitted.test(np.float32)
            predictions.tofile(file)
            if with_moments:
                fitted.left_out_moments()
            if is_checked:
                checked = predictions[:, :TOKEN_WIDTH].copy()
            n_targets += predictions.shape[1]
    return {"n_targets": n_targets, "checked": checked, "pid": os.getpid(), "peak": peak_bytes() / 1e9}


def read_token(folder: str, sizes: Sizes) -> np.ndarray:
    stage = stage_of(folder, "targets/clip_vision")
    return read_columns(stage, "train", [part.name for part in sizes.parts], [CHECKED], sizes.n_train)


def measure_one_fit(folder: str, sizes: Sizes, dtype: str, library: str) -> dict:
    """Seconds of a fit to one token and its test predictions, arrays in memory."""
    train, test = (betas.astype(dtype) for betas in read_betas(folder, sizes))
    targets = read_token(folder, sizes).astype(dtype)
    if library == "scikit-learn":
        from sklearn.linear_model import Ridge

        model = Ridge(alpha=ALPHA)
    else:
        from himalaya.kernel_ridge import KernelRidge

        targets = targets - targets.mean(0)
        model = KernelRidge(alpha=ALPHA, kernel="linear")
    started = time.perf_counter()
    checked = model.fit(train, targets).predict(test)
    return {"targets": time.perf_counter() - started, "checked": checked}


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


def operations(sizes: Sizes, with_moments: bool) -> float:
    """Of the products that nsdray's way cannot do without; a multiplication and an addition count as two."""
    n, p, m = sizes.n_train, sizes.n_voxels, sizes.n_test
    once = n * n * p + n**3 / 3 + 2 * m * n * p  # half of X X', Cholesky, test kernel
    return once + (2 if with_moments else 1) * (2 * m * n * n + 2 * m * n * N_TARGETS)  # solving for smoothers, smoothing


def apart(function: Callable[..., dict], *arguments: object) -> dict:
    """Its result in a process of its own, with that process's peak memory in GB."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:  # may start processes itself
        return pool.submit(_with_peak, function, arguments).result()


def _with_peak(function: Callable[..., dict], arguments: tuple) -> dict:
    found = function(*arguments)
    gpu = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0
    return found | {"peak": peak_bytes() / 1e9, "gpu": gpu}


def peak_bytes() -> int:
    """Of this process. On Linux from /proc: ru_maxrss begins with what the parent had when it forked."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def difference(ours: np.ndarray, reference: np.ndarray) -> float:
    """Largest difference, relative to the reference's standard deviation."""
    return float(np.abs(ours - reference).max() / reference.std())


def line(what: str, seconds: float, found: dict, note: str = "") -> None:
    gpu = f", GPU {found['gpu']:.2f} GB" if found["gpu"] else ""
    peak = max(found["peak"], found.get("workers", 0))
    print(f"  {what:38s}{seconds:8.1f} s   peak {peak:5.2f} GB{gpu}   {note}", flush=True)


def compare(folder: str, sizes: Sizes, dtype: str, fraction: float, exact: np.ndarray) -> None:
    """Print everything in one precision. exact: predictions of the checked token by scikit-learn in float64."""
    rates = {name: rate for name, rate in apart(measure_rate, sizes, dtype).items() if name not in ("peak", "gpu")}
    print(f"{dtype}: matrix products by " + ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in rates.items()))
    single = apart(measure_one_fit, folder, sizes, dtype, "scikit-learn")
    slow = single["targets"] * N_FITS
    line("scikit-learn, a token", single["targets"], single, f"off by {difference(single['checked'], exact):.1e}")
    print(f"  scikit-learn, times {N_FITS:<18d}{slow:8.0f} s")
    token = apart(measure_nsdray, folder, sizes, dtype, False, fraction, True)
    line("nsdray, this token, from Parquet", token["before"] + token["targets"], token)
    if importlib.util.find_spec("himalaya"):
        other = apart(measure_one_fit, folder, sizes, dtype, "himalaya")
        centred = exact - read_token(folder, sizes).mean(0, dtype=np.float64)
        line("himalaya's KernelRidge, this token", other["targets"], other, f"off by {difference(other['checked'], centred):.1e}")
    else:
        print("  himalaya is not installed: skipped")
    for with_moments, goal in ((False, 80), (True, 50)):
        found = apart(measure_nsdray, folder, sizes, dtype, with_moments, fraction, False)
        seconds = found["before"] + found["targets"] * N_TARGETS / found["n_targets"]
        work = operations(sizes, with_moments)
        floor = work / max(rates.values())
        note = f"off by {difference(found['checked'], exact):.1e}; {found['before']:.1f} s before the targets"
        if found["n_targets"] < N_TARGETS:
            note += f"; scaled up from {found['n_targets']:,} targets"
        line(f"nsdray, all targets{', with moments' if with_moments else ''}", seconds, found, note)
        print(f"    {slow / seconds:.0f} times as fast as scikit-learn (goal: {goal})")
        print(f"    {seconds / floor:.2f} times the floor (goal: 1.5), {floor:.1f} s for {work / 1e12:.1f} TFLOP", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fraction", type=float, default=1.0, help="of the blocks of targets")
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of images and voxels")
    parser.add_argument("--folder", default=None, help="where to put the temporary folder")
    arguments = parser.parse_args()
    sizes = Sizes(*(max(2, round(arguments.scale * size)) for size in (8859, 982, 15_724)))
    n_bytes = 2 * sizes.n_train * N_TARGETS + 4 * sizes.n_test * N_TARGETS + 4 * sizes.n_train * sizes.n_voxels
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        free = shutil.disk_usage(folder).free
        if free < 1.1 * n_bytes:
            raise SystemExit(f"{folder} has {free / 1e9:.1f} GB free, but needs {1.1 * n_bytes / 1e9:.1f} GB: choose a --folder")
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"
        print(f"Ridge, {device}: {sizes.n_train:,} x {sizes.n_voxels:,} betas, {N_TARGETS:,} targets, {sizes.n_test} test images",
              flush=True)  # fmt: skip
        apart(write_data, folder, sizes)
        exact = apart(measure_one_fit, folder, sizes, "float64", "scikit-learn")["checked"]
        for dtype in ("float64", "float32"):
            compare(folder, sizes, dtype, arguments.fraction, exact)


if __name__ == "__main__":
    main()
