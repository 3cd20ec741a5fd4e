"""The jobs as users call them: help, errors, and a run that is killed again and again."""
from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

CHECKOUT = Path(__file__).parent.parent
SMALL = """
    mini --data.subjects 1 --n-layers 3 --targets.n-layers 3 --simulation.n-train 96 --simulation.n-test 12
    --simulation.n-sessions 3 --gru.hidden 8 --gru.n-epochs 6 --gru.checkpoint-every 2 --data.rows-per-part 64
    --stage2.n-steps 4 --stage2.batch-size 6
""".split()


def start(job: str, *arguments: str, **settings) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, f"jobs/{job}.py", *arguments], cwd=CHECKOUT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, env=os.environ | {"COLUMNS": "200"}, **settings,
    )  # fmt: skip


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=400)
    return f"{process.returncode}\n{output}"


@pytest.mark.parametrize(
    "job", ["train_all_subjects", "prepare_betas", "extract_targets", "reconstruct_test_set", "evaluate", "report"]
)
def test_help_teaches(job):
    output = finish(start(job, "--help"))
    assert output.startswith("0") and f"python jobs/{job}.py" in output
    assert all(recipe in output for recipe in ("mini", "gru-15", "gru-31", "ridge-15", "ridge-31", "brain-diffuser"))


def test_help_of_a_recipe_explains_every_field():
    output = finish(start("train_all_subjects", "mini", "--help"))
    assert "--data.protocol" in output and "sessions 1 to 37" in output and "--ridge.alpha" in output


def test_help_and_errors_of_estimate_betas(tmp_path):
    output = finish(start("estimate_betas", "--help"))
    assert output.startswith("0") and "python jobs/estimate_betas.py --bids.root" in output
    assert "NSD's name for this type of betas" in output
    output = finish(start("estimate_betas", "--nsd-root", "/nowhere", "--store.root", str(tmp_path)))
    assert not output.startswith("0") and "/nowhere is no folder" in output and "Traceback" not in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.nsd-root", "/nowhere"], "/nowhere"),
        (["gru-15", "--data.subjects", "11"], "choose from"),
        (["mini", "--data.rois", "V9"], "V9"),
    ],
)
def test_user_errors_are_told_without_a_traceback(arguments, message, tmp_path):
    output = finish(start("train_all_subjects", *arguments, "--store.root", str(tmp_path)))
    assert not output.startswith("0") and message in output and "Traceback" not in output


def scores(root: Path) -> dict[str, list]:
    return {path.parts[-3].split("-")[0]: pq.read_table(path, partitioning=None).to_pylist()
            for path in sorted(root.glob("metrics/*/subject=01/scores.parquet"))}  # fmt: skip


def test_killed_again_and_again_it_ends_with_the_same_scores(tmp_path):
    """SIGKILL to the driver's whole session once each of these appears, then a start that ends."""
    undisturbed = finish(start("train_all_subjects", *SMALL, "--store.root", str(tmp_path / "a")))
    assert undisturbed.startswith("0"), undisturbed
    root = tmp_path / "b"
    stages = [f"reconstructions/stage{i}-*/*/*" for i in (1, 2)]
    signs = "miniature-nsd-*/nsddata", "targets/*", "training/*/checkpoint_*", *stages
    for sign in signs:
        process = start("train_all_subjects", *SMALL, "--store.root", str(root), start_new_session=True)
        deadline = time.monotonic() + 200
        while not list(root.glob(sign)) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert process.poll() is None, f"ended before {sign} appeared: {finish(process)}"
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    output = finish(start("train_all_subjects", *SMALL, "--store.root", str(root)))
    assert output.startswith("0"), output
    assert scores(root) == scores(tmp_path / "a") and scores(root).keys() == {"ridge", "gru", "mean", "nearest", "vae"}
    again = time.monotonic()
    assert "Everything is up to date" in finish(start("train_all_subjects", *SMALL, "--store.root", str(root)))
    assert time.monotonic() - again < 60
