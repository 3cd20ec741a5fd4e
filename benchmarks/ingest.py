"""How fast a session of betas is read, beside what the storage alone allows.

    python benchmarks/ingest.py            # a full-size session: 81 x 104 x 83 voxels, 750 trials (needs 2 GB of disk)
    python benchmarks/ingest.py --help

Writes synthetic sessions as NSD stores them to a temporary folder, reads each once to warm the page cache, and then
times in turn, in one process, `read_session` and what bounds it: for HDF5 a bare loop of ``read_direct_chunk`` over the
same chunks that throws away what it reads, in the voxels' order and in the file's (faster, so the harder bound); for
NIfTI the decompression of the whole stream by the same gzip module. Rates are medians over the rounds; a ratio is the
median of the rounds' ratios, so that other load falls on both sides. Peak memory is what a fresh process needs above
its own size before the read.
"""
from __future__ import annotations

import argparse
import gzip
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
from scipy.ndimage import gaussian_filter

from nsdray.nsd.betas import read_session, session_shape
from nsdray.nsd.rois import Voxels


def cortex_like_voxels(shape: tuple[int, int, int], n_voxels: int) -> Voxels:
    """n_voxels scattered in the folds of a posterior shell, as nsdgeneral is."""
    random = np.random.default_rng(0)
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    folds = gaussian_filter(random.standard_normal(shape), 2)
    score = np.abs(np.sqrt(x**2 + y**2 + z**2) - 0.8 + folds / folds.std() * 0.05) + 0.2 * (y + 1)
    index = np.sort(np.argsort(score.ravel())[:n_voxels])
    return Voxels(index.astype(np.int64), shape, [""] * n_voxels, None)


def write_hdf5(path: Path, voxels: Voxels, n_trials: int) -> None:
    """A session chunked (n_trials, 1, 1, 1), every chunk written, in file order: the index is as deep as NSD's."""
    noise = np.random.default_rng(1).integers(-900, 900, 2 * n_trials).astype("<i2")
    with h5py.File(path, "w") as file:
        size = (n_trials, *voxels.shape[::-1])
        dataset = file.create_dataset("betas", size, "<i2", chunks=(n_trials, 1, 1, 1))
        for voxel, (z, y, x) in enumerate(np.ndindex(size[1:])):
            start = voxel % n_trials
            dataset.id.write_direct_chunk((0, z, y, x), noise[start : start + n_trials].tobytes())


def write_nifti(path: Path, voxels: Voxels, n_trials: int) -> None:
    """A compressed session: noise in the brain (half of the volume), zeros around it."""
    random = np.random.default_rng(2)
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in voxels.shape), indexing="ij")
    brain = (x**2 + y**2 + z**2 < 1).ravel(order="F")
    header = nib.Nifti1Header()
    header.set_data_dtype(np.int16)
    header.set_data_shape((*voxels.shape, n_trials))
    header["magic"], header["vox_offset"] = b"n+1", 352
    volume = np.zeros(brain.size, "<i2")
    with gzip.open(path, "wb", compresslevel=1) as stream:
        stream.write(header.binaryblock + bytes(4))
        for _ in range(n_trials):
            volume[brain] = random.normal(0, 450, int(brain.sum()))
            stream.write(volume.tobytes())


def bare_chunks_in_voxel_order(path: Path, voxels: Voxels) -> None:
    x, y, z = np.unravel_index(voxels.index, voxels.shape)
    with h5py.File(path) as file:
        read = file["betas"].id.read_direct_chunk
        for i, j, k in zip(z.tolist(), y.tolist(), x.tolist()):
            read((0, i, j, k))


def bare_chunks_in_file_order(path: Path, voxels: Voxels) -> None:
    index = np.ravel_multi_index(np.unravel_index(voxels.index, voxels.shape)[::-1], voxels.shape[::-1])
    z, y, x = np.unravel_index(np.sort(index), voxels.shape[::-1])
    with h5py.File(path) as file:
        read = file["betas"].id.read_direct_chunk
        for i, j, k in zip(z.tolist(), y.tolist(), x.tolist()):
            read((0, i, j, k))


def bare_decompression(path: Path, voxels: Voxels) -> None:
    n_bytes = 2 * int(np.prod(voxels.shape))
    with gzip.open(path) as stream:
        while stream.read(n_bytes):
            pass


def compare(path: Path, voxels: Voxels, bounds: list[Callable], n_bytes: int, n_rounds: int) -> None:
    """Print all rates in MB/s (10^6 bytes) of n_bytes, and read_session's as a fraction of each bound."""
    seconds = {function: [] for function in (*bounds, read_session)}
    for function in seconds:
        function(path, voxels)
    for _ in range(n_rounds):
        for function, times in seconds.items():
            start = time.perf_counter()
            function(path, voxels)
            times.append(time.perf_counter() - start)
    for function, times in seconds.items():
        ratio = np.median(np.divide(times, seconds[read_session]))
        share = "" if function is read_session else f"   read_session reaches {ratio:.2f} of it (goal 0.80)"
        print(f"  {function.__name__:28s}{n_bytes / np.median(times) / 1e6:6.0f} MB/s{share}")


def report_memory(path: Path, voxels: Voxels) -> None:
    """Print the peak memory of a read in a fresh process."""
    index = path.with_name("index.npy")
    np.save(index, voxels.index)
    command = [sys.executable, __file__, "--measure-memory", str(path), str(index)]
    peak = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(f"  peak memory above the start {peak:.0f} MB (goal below 1500)")


def measure_memory(path: Path, index: Path) -> None:
    """Print by how many MB one read raises this process's peak."""
    voxels = Voxels(np.load(index), session_shape(path)[1], [], None)
    before = _peak_kb()
    read_session(path, voxels)
    print((_peak_kb() - before) / 1e3)


def _peak_kb() -> int:
    """Peak resident size on Linux. ru_maxrss would begin at that of the parent process."""
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=(81, 104, 83), help="X Y Z of the volume")
    parser.add_argument("--voxels", type=int, default=15_700, help="voxels of the ROI")
    parser.add_argument("--trials", type=int, default=750, help="trials of the HDF5 session")
    parser.add_argument("--nifti-trials", type=int, default=60, help="trials of the NIfTI session; 750 takes minutes")
    parser.add_argument("--rounds", type=int, default=15, help="timed reads of each kind; of NIfTI 3 at most")
    parser.add_argument("--folder", type=Path, help="where to write; default: the system's temporary folder")
    parser.add_argument("--measure-memory", type=Path, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure_memory:
        return measure_memory(*args.measure_memory)
    voxels = cortex_like_voxels(tuple(args.shape), args.voxels)
    grid = " x ".join(map(str, args.shape))
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder) / "betas_session01.hdf5"
        write_hdf5(path, voxels, args.trials)
        print(f"HDF5, {grid}, {args.trials} trials, {args.voxels} voxels; MB are those of the chosen voxels")
        bounds = [bare_chunks_in_voxel_order, bare_chunks_in_file_order]
        compare(path, voxels, bounds, 2 * args.trials * args.voxels, args.rounds)
        report_memory(path, voxels)
        path.unlink()
        path = Path(folder) / "betas_session01.nii.gz"
        write_nifti(path, voxels, args.nifti_trials)
        print(f"NIfTI .nii.gz, {grid}, {args.nifti_trials} trials; MB are those of the decompressed volumes")
        n_bytes = 2 * args.nifti_trials * int(np.prod(args.shape))
        compare(path, voxels, [bare_decompression], n_bytes, min(3, args.rounds))
        report_memory(path, voxels)


if __name__ == "__main__":
    main()
