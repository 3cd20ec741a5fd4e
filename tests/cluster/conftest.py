"""A Ray cluster of two CPUs, and a small decoding run on it."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import ray

from nsdray.cluster.results import train_all_subjects
from nsdray.config import Config, DataConfig, GRUConfig, RidgeConfig, SimulationConfig, Stage2Config, StoreConfig, TargetsConfig
from nsdray.stages import Plan


def small_config(root: Path, **changes) -> Config:
    """Two subjects, 96 + 12 images, three layers, a few epochs."""
    config = Config(
        n_layers=3,
        data=DataConfig(subjects=(1, 2), rows_per_part=64),
        simulation=SimulationConfig(n_train=96, n_test=12, n_sessions=3),
        targets=TargetsConfig(n_layers=3, batch_size=16),
        ridge=RidgeConfig(alpha=4_000.0, alpha_vision=4_000.0, alpha_text=4_000.0),
        gru=GRUConfig(hidden=8, batch_size=32, n_epochs=4, checkpoint_every=2),
        stage2=Stage2Config(sampler="unipc", n_steps=4, guidance=2.0, batch_size=6),
        store=StoreConfig(str(root)),
    )
    return replace(config, **changes)


@pytest.fixture(scope="session")
def cluster():
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def finished(tmp_path_factory, cluster) -> Plan:
    """A finished run."""
    plan = Plan(small_config(tmp_path_factory.mktemp("run")))
    train_all_subjects(plan)
    return plan
