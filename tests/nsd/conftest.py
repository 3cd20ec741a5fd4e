from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from nsdray.nsd.layout import NSDLayout
from nsdray.nsd.simulate import simulate_nsd


@pytest.fixture(scope="session")
def tiny() -> dict:
    """Parameters of the smallest miniature NSD that has every area."""
    return dict(n_train=12, n_test=6, n_sessions=3, picture_size=16, volume=(10, 12, 8), progress=False)


@pytest.fixture(scope="session")
def mini(tiny, tmp_path_factory) -> NSDLayout:
    """A tiny miniature NSD with subjects 1 and 5. Shared by all tests: do not write to it."""
    return simulate_nsd(tmp_path_factory.mktemp("mini") / "nsd", subjects=(1, 5), **tiny)


@pytest.fixture
def mini_copy(mini, tmp_path) -> NSDLayout:
    """A copy to damage."""
    return NSDLayout(Path(shutil.copytree(mini.root, tmp_path / "copy")))
