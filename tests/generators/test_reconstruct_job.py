"""jobs/reconstruct_test_set.py: pictures, and nothing that wants the weights of a metric."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
SMALL = """
    mini --data.subjects 1 --n-layers 3 --targets.n-layers 3 --simulation.n-train 96 --simulation.n-test 12
    --simulation.n-sessions 3 --gru.hidden 8 --gru.n-epochs 2 --data.rows-per-part 64 --stage2.n-steps 4 --stage2.batch-size 6
    --evaluation.suites brain_diffuser
""".split()


@pytest.mark.slow
def test_pictures_are_made_without_the_weights_of_metrics(tmp_path):
    command = [sys.executable, "jobs/reconstruct_test_set.py", *SMALL, "--store.root", str(tmp_path / "store"),
               "--evaluation.weights", str(tmp_path)]  # fmt: skip
    how = {"cwd": CHECKOUT, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "timeout": 900}
    first = subprocess.run(command, **how, env=os.environ | {"COLUMNS": "200"})
    assert first.returncode == 0, first.stdout
    for model in ("ridge", "gru"):
        for stage in ("stage1", "stage2"):
            pictures = list((tmp_path / "store").glob(f"reconstructions/{stage}-{model}-3-*/subject=01/*.parquet"))
            assert pictures and str(pictures[0].parents[1]) in first.stdout
    assert not list((tmp_path / "store").glob("metrics/*")) and not list((tmp_path / "store").glob("features/*"))
    second = subprocess.run(command, **how, env=os.environ | {"COLUMNS": "200"})
    assert second.returncode == 0 and "Everything is up to date" in second.stdout
