"""How long single-trial betas of type D take: ours beside loops over voxels.

    python benchmarks/glm.py            # 20,000 voxels x 3 runs of 226 volumes, 180 trials
    python benchmarks/glm.py --voxels 2000 --loop-voxels 5
    python benchmarks/glm.py --reference GLMsingle --reference-python PYTHON    # also the authors' package

Writes simulated BOLD (TR 4/3 s, 3 s stimuli every 4 s, 60 images once a run, a fitted HRF per voxel, shared noise) to a
temporary folder and fits it, each way in a process of its own:

- ``one process``, ``two processes``: `nsdray.glm` over chunks of voxels, the latter by a pool of forked workers;
- ``a voxel at a time``: the same functions on chunks of one voxel, which share the designs' decompositions;
- ``plain loop``: what algorithm 1 says, for a voxel after the other: `numpy.linalg.lstsq` for each HRF, run and number
  of regressors, and ridge regression from a decomposition of the voxel's own design;
- ``reference package``: cvnlab/GLMsingle with its default options, all four types, from a checkout and by a Python that has
  its requirements.

The loops are measured on a few voxels and scaled to all; what they would need of all voxels (noise pool, regressors) is
given to them. Every process has one thread. Times are without imports; where another program shares the cores, compare
CPU seconds. Peak memory is that of the largest process, with what it touched of the data.
"""
from __future__ import annotations

import argparse
import contextlib
import mmap
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from nsdray.glm.crossval import repeat_pairs
from nsdray.glm.design import make_design
from nsdray.glm.fit import batch_size, last_pass, survey
from nsdray.glm.hrf import hrf_library
from nsdray.glm.model import trial_model
from nsdray.glm.ridge import FRACTIONS, match_scale

TR, STIMULUS, GAP, N_IMAGES, N_TIMEPOINTS, N_RUNS = 4 / 3, 3.0, 3, 60, 226, 3
N_CANDIDATES = 10
WAYS = ("one process", "two processes", "a voxel at a time", "plain loop")


def design_matrices() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    designs = np.zeros((N_RUNS, N_TIMEPOINTS, N_IMAGES), np.float32)
    for design in designs:
        design[3 + GAP * np.sort(random.permutation(66)[:N_IMAGES]), random.permutation(N_IMAGES)] = 1
    return list(designs)


def simulate(folder: Path, n_voxels: int) -> None:
    """Half of the voxels answer. One file per run, float32 (n_voxels, n_timepoints)."""
    random, matrices = np.random.default_rng(1), design_matrices()
    design = make_design(matrices, [(n_voxels, N_TIMEPOINTS)] * N_RUNS, STIMULUS, TR)
    hrf_index = np.arange(n_voxels) % 20
    betas = (1 + 1.5 * random.standard_normal((n_voxels, N_IMAGES))) * (random.random((n_voxels, 1)) < 0.5)
    loads = random.standard_normal((n_voxels, 4))
    responses = hrf_library(STIMULUS, TR)
    for run in range(N_RUNS):
        trials = design.trials_of(run)
        since_onset = np.arange(N_TIMEPOINTS)[:, None] * TR - design.onset[trials]
        percent = 0.7 * random.standard_normal((n_voxels, N_TIMEPOINTS), np.float32)
        percent += loads @ np.cumsum(0.3 * random.standard_normal((4, N_TIMEPOINTS)), axis=1)
        for hrf, x in enumerate(responses.at(since_onset)):
            rows = hrf_index == hrf
            percent[rows] += betas[rows][:, design.condition[trials]] @ x.T
        np.save(folder / f"run{run}.npy", (1000 * (1 + percent / 100)).astype(np.float32))


def load(folder: Path) -> list[np.ndarray]:
    return [np.load(folder / f"run{run}.npy", mmap_mode="r") for run in range(N_RUNS)]


def fit(folder: Path, n_voxels: int, n_processes: int, size: int | None = None) -> np.ndarray:
    """Type D; with two or more processes, every pass forks a pool that inherits the pass's function and matrices."""
    design = make_design(design_matrices(), [(n_voxels, N_TIMEPOINTS)] * N_RUNS, STIMULUS, TR)
    size = size or min(batch_size(design), -(-n_voxels // (2 * n_processes)))
    starts = range(0, n_voxels, size)

    def each_chunk(function, *arguments):
        if n_processes == 1:
            runs = load(folder)
            for start, *rest in zip(starts, *arguments):
                yield function([run[start : start + size] for run in runs], *rest)
            return
        global _task
        _task = folder, size, function, list(zip(starts, *arguments))
        with multiprocessing.get_context("fork").Pool(n_processes) as pool:
            yield from pool.imap(_run_task, range(len(starts)))

    found = survey(design, hrf_library(STIMULUS, TR), each_chunk)

    shared = mmap.mmap(-1, 4 * n_voxels * design.n_trials)  # betas go where they belong, not through a pipe
    betas = np.frombuffer(shared, np.float32).reshape(n_voxels, design.n_trials)

    def write_betas(chunk, hrf_index, start):
        betas[start : start + size] = last_pass(found.model, FRACTIONS, chunk, hrf_index).betas

    hrf_index = [found.first.hrf_index[start : start + size] for start in starts]
    for _ in each_chunk(write_betas, hrf_index, starts):
        pass
    return betas


def _run_task(number: int):
    folder, size, function, arguments = _task
    start, *rest = arguments[number]
    return function([run[start : start + size] for run in load(folder)], *rest)


_task = None


def plain_loop(folder: Path, n_voxels: int) -> np.ndarray:
    """Type D of the first n_voxels, one after the other."""
    design = make_design(design_matrices(), [(n_voxels, N_TIMEPOINTS)] * N_RUNS, STIMULUS, TR)
    library, data = hrf_library(STIMULUS, TR), load(folder)
    since_onset = [np.arange(N_TIMEPOINTS)[:, None] * TR - design.onset[design.trials_of(run)] for run in range(N_RUNS)]
    designs = [library.at(one) for one in since_onset]
    drifts = [design.drifts(run) for run in range(N_RUNS)]
    random = np.random.default_rng(2)  # how long they take does not depend on what they are
    noise = [np.hstack([one, random.standard_normal((N_TIMEPOINTS, N_CANDIDATES))]) for one in drifts]
    pairs = repeat_pairs(design).toarray()
    betas = np.empty((n_voxels, design.n_trials))
    for voxel in range(n_voxels):
        series = [run[voxel].astype(float) for run in data]
        explained = []
        for hrf in range(20):
            fits = [_least_squares(x[hrf], d, y) for x, d, y in zip(designs, drifts, series)]
            explained.append(-sum(rest for _, rest in fits))
        own = [x[int(np.argmax(explained))] for x in designs]
        candidates = []
        for p in range(N_CANDIDATES + 1):
            fits = [_least_squares(x, g[:, : d.shape[1] + p], y) for x, g, d, y in zip(own, noise, drifts, series)]
            candidates.append(np.concatenate([beta for beta, _ in fits]))
        _best(candidates, pairs)
        nuisances = [g[:, : d.shape[1] + 4] for g, d in zip(noise, drifts)]
        betas[voxel] = _plain_ridge(own, nuisances, series, pairs)
    return betas


def _least_squares(x: np.ndarray, nuisance: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, float]:
    solution, rest, *_ = np.linalg.lstsq(np.hstack([x, nuisance]), y, rcond=None)
    return solution[: x.shape[1]], float(rest[0])


def _best(candidates: list[np.ndarray], pairs: np.ndarray) -> np.ndarray:
    """The candidate that repeats best; the first is unregularised."""
    z0, *_ = z = [(one - candidates[0].mean()) / candidates[0].std(ddof=1) for one in candidates]
    errors = [((one[:, None] - z0) ** 2 * pairs).sum() for one in z]
    return candidates[int(np.argmin(errors))]


def _plain_ridge(designs, nuisances, series, pairs) -> np.ndarray:
    blocks = []
    for x, nuisance, y in zip(designs, nuisances, series):
        basis = np.linalg.qr(nuisance)[0]
        left, singular, right = np.linalg.svd(x - basis @ (basis.T @ x), full_matrices=False)
        blocks.append((left.T @ y / singular, singular**2, right))
    rotated, squared = (np.concatenate([block[i] for block in blocks]) for i in (0, 1))
    grid = np.concatenate([[0], np.geomspace(1e-3 * squared.min(), 20 * squared.max(), 80)])
    length = np.sqrt([((rotated * squared / (squared + alpha)) ** 2).sum() for alpha in grid])
    alphas = np.interp(FRACTIONS, length[::-1] / length[0], grid[::-1])
    ends, candidates = np.cumsum([len(block[0]) for block in blocks])[:-1], []
    for alpha in alphas:
        parts = np.split(rotated * squared / (squared + alpha), ends)
        candidates.append(np.concatenate([block[2].T @ part for block, part in zip(blocks, parts)]))
    best = _best(candidates, pairs)
    scale, offset = match_scale(best[None], candidates[0][None])
    return scale * best + offset


def reference(folder: Path) -> None:
    """The authors' package on the same data, in memory as it wants them."""
    from glmsingle.glmsingle import GLM_single

    model = GLM_single({"wantfileoutputs": [0, 0, 0, 0], "wantmemoryoutputs": [1, 1, 1, 1]})
    with tempfile.TemporaryDirectory() as output:  # the package empties the folders that it is given
        data = [np.load(folder / f"run{run}.npy") for run in range(N_RUNS)]
        model.fit(design_matrices(), data, STIMULUS, TR, outputdir=f"{output}/out", figuredir=None)


def measure(way: str, folder: Path, n_voxels: int) -> None:
    """Run one way in this process and print its seconds of wall clock and of CPU, and its peak memory in MB."""
    before, setup = _now(), np.zeros(2)
    if way == "reference package":
        from glmsingle import glmsingle  # noqa: F401  (times are without imports)

        before = _now()
        with contextlib.redirect_stdout(sys.stderr):
            reference(folder)
    elif way == "plain loop":
        plain_loop(folder, n_voxels)
    elif way == "a voxel at a time":
        design = make_design(design_matrices(), [(n_voxels, N_TIMEPOINTS)] * N_RUNS, STIMULUS, TR)
        trial_model(design, hrf_library(STIMULUS, TR))
        setup, before = 2 * (_now() - before), _now()  # made twice, with and without regressors, whatever the voxels
        fit(folder, n_voxels, 1, size=1)
    else:
        fit(folder, n_voxels, WAYS.index(way) + 1)
    seconds = np.maximum(_now() - before - setup, 0)
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(*seconds, peak / 1024)


def _now() -> np.ndarray:
    """Wall clock and CPU time of this process and its finished children, seconds."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return np.array([time.perf_counter(), sum(one.ru_utime + one.ru_stime for one in usage)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--voxels", type=int, default=20_000)
    parser.add_argument("--loop-voxels", type=int, default=50, help="voxels that the plain loop is measured on")
    parser.add_argument("--reference", type=Path, help="checkout of github.com/cvnlab/GLMsingle, to be measured too")
    parser.add_argument("--reference-python", default=sys.executable, help="an interpreter with that package's requirements")
    parser.add_argument("--measure", nargs=3, metavar=("WAY", "FOLDER", "VOXELS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args.measure[0], Path(args.measure[1]), int(args.measure[2]))
        return
    threads = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    paths = [str(Path(__file__).parents[1]), *([str(args.reference.resolve())] if args.reference else [])]
    environment = os.environ | threads | {"PYTHONPATH": os.pathsep.join(paths), "MPLBACKEND": "Agg", "PYTHONWARNINGS": "ignore"}
    sizes = dict(zip(WAYS, (args.voxels, args.voxels, min(20 * args.loop_voxels, args.voxels), args.loop_voxels)))
    with tempfile.TemporaryDirectory() as folder:
        simulate(Path(folder), args.voxels)
        print(f"GLM, type D, {args.voxels} voxels x {N_RUNS} runs x {N_TIMEPOINTS} volumes, {N_RUNS * N_IMAGES} trials")
        first = None
        for way in [*WAYS, *(["reference package"] if args.reference else [])]:
            python = args.reference_python if way == "reference package" else sys.executable
            sizes.setdefault(way, args.voxels)
            command = [python, __file__, "--measure", way, folder, str(sizes[way])]
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            if done.returncode:
                sys.exit(done.stderr)
            seconds, cpu, peak = map(float, done.stdout.split())
            seconds, cpu = (value * args.voxels / sizes[way] for value in (seconds, cpu))
            first = first or seconds
            scaled = "" if sizes[way] == args.voxels else f"   scaled from {sizes[way]} voxels"
            ratio = f"{seconds / first:8.2f} x one process"
            print(f"  {way:20s}{seconds:10.1f} s ({cpu:9.1f} s CPU)   {ratio}   peak {peak:6.0f} MB{scaled}")


if __name__ == "__main__":
    main()
