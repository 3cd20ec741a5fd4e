"""How fast a session of betas is read, beside what the storage alone allows.

    python benchmarks/ingest.py            # a full-size session: 81 x 104 x 83 voxels, 750 trials (needs 2 GB of disk)
    python benchmarks/ingest.py --help

Writes synthetic sessions as NSD stores them to a temporary folder, reads each once to warm the page cache, and then
times in turn, in one process, `read_session` and its bound: for HDF5 a bare loop of ``read_direct_chunk`` over the same
chunks in the file's order, for NIfTI the decompression of the whole stream by the same gzip module. Medians over the
rounds. Peak memory is what a fresh process needs above its own size before the read.
"""
from __future__ import annotations

import argparse
import gzip
import resource
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


def write_hdf5(path: Path, voxels: Voxels, n_trials: int, n_others: int) -> None:
    """A session chunked (n_trials, 1, 1, 1), with the chunks of the voxels and of n_others more, in file order."""
    random = np.random.default_rng(1)
    others = random.permutation(np.setdiff1d(np.arange(np.prod(voxels.shape)), voxels.index))[:n_others]
    x, y, z = np.unravel_index(np.concatenate([voxels.index, others]), voxels.shape)
    order = np.lexsort((x, y, z))
    with h5py.File(path, "w") as file:
        size = (n_trials, *voxels.shape[::-1])
        dataset = file.create_dataset("betas", size, "<i2", chunks=(n_trials, 1, 1, 1))
        for i, j, k in zip(z[order].tolist(), y[order].tolist(), x[order].tolist()):
            chunk = random.integers(-900, 900, n_trials).astype("<i2")
            dataset.id.write_direct_chunk((0, i, j, k), chunk.tobytes())


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


def bare_chunks(path: Path, voxels: Voxels) -> None:
    """The bound for HDF5: fetch the chunks in file order and throw them away."""
    x, y, z = np.unravel_index(voxels.index, voxels.shape)
    order = np.lexsort((x, y, z))
    with h5py.File(path) as file:
        read = file["betas"].id.read_direct_chunk
        for i, j, k in zip(z[order].tolist(), y[order].tolist(), x[order].tolist()):
            read((0, i, j, k))


def bare_decompression(path: Path, voxels: Voxels) -> None:
    """The bound for NIfTI: decompress a volume's bytes at a time and throw them away."""
    n_bytes = 2 * int(np.prod(voxels.shape))
    with gzip.open(path) as stream:
        while stream.read(n_bytes):
            pass


def compare(path: Path, voxels: Voxels, bare: Callable, n_bytes: int, n_rounds: int) -> None:
    """Print both rates in MB/s (10^6 bytes) of n_bytes and their ratio."""
    seconds = {bare: [], read_session: []}
    for function in seconds:
        function(path, voxels)
    for _ in range(n_rounds):
        for function, times in seconds.items():
            start = time.perf_counter()
            function(path, voxels)
            times.append(time.perf_counter() - start)
    bound, ours = (n_bytes / np.median(times) / 1e6 for times in seconds.values())
    print(f"  bare storage {bound:7.0f} MB/s\n  read_session {ours:7.0f} MB/s   ratio {ours / bound:.2f} (goal 0.80)")


def report_memory(path: Path, n_voxels: int) -> None:
    """Print the peak memory of a read in a fresh process."""
    command = [sys.executable, __file__, "--measure-memory", str(path), "--voxels", str(n_voxels)]
    peak = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(f"  peak memory above the start {peak:.0f} MB (goal below 1500)")


def measure_memory(path: Path, n_voxels: int) -> None:
    voxels = cortex_like_voxels(session_shape(path)[1], n_voxels)
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            start = int(line.split()[1])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    read_session(path, voxels)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print((after - start if after > before else 0) / 1e3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=(81, 104, 83), help="X Y Z of the volume")
    parser.add_argument("--voxels", type=int, default=15_700, help="voxels of the ROI")
    parser.add_argument("--trials", type=int, default=750, help="trials of the HDF5 session")
    parser.add_argument("--nifti-trials", type=int, default=60, help="trials of the NIfTI session; 750 takes minutes")
    parser.add_argument("--rounds", type=int, default=7, help="timed reads of each kind; NIfTI takes 3 at most")
    parser.add_argument("--folder", type=Path, help="where to write; default: the system's temporary folder")
    parser.add_argument("--measure-memory", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure_memory:
        return measure_memory(args.measure_memory, args.voxels)
    voxels = cortex_like_voxels(tuple(args.shape), args.voxels)
    grid = " x ".join(map(str, args.shape))
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder) / "betas_session01.hdf5"
        write_hdf5(path, voxels, args.trials, n_others=min(10 * args.voxels, int(np.prod(args.shape)) // 4))
        print(f"HDF5, {grid}, {args.trials} trials, {args.voxels} voxels; MB are those of the chosen voxels")
        compare(path, voxels, bare_chunks, 2 * args.trials * args.voxels, args.rounds)
        report_memory(path, args.voxels)
        path.unlink()
        path = Path(folder) / "betas_session01.nii.gz"
        write_nifti(path, voxels, args.nifti_trials)
        print(f"NIfTI .nii.gz, {grid}, {args.nifti_trials} trials; MB are those of the decompressed volumes")
        n_bytes = 2 * args.nifti_trials * int(np.prod(args.shape))
        compare(path, voxels, bare_decompression, n_bytes, min(3, args.rounds))
        report_memory(path, args.voxels)


if __name__ == "__main__":
    main()
