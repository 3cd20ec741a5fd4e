"""Published figures: spot checks against the printed tables, and names that exist."""
from __future__ import annotations

import pytest

from nsdray.metrics.perceptual import SUITES
from nsdray.metrics.published import FOUR, PUBLISHED, Published
from nsdray.metrics.table import LATENT_METRICS


def one(**conditions: object) -> Published:
    found = [row for row in PUBLISHED if all(getattr(row, key) == value for key, value in conditions.items())]
    assert len(found) == 1, f"{conditions}: {found}"
    return found[0]


def test_every_name_is_a_metric_of_ours_or_says_that_it_is_not():
    ours = {metric.name: metric for suite in SUITES.values() for metric in suite}
    for row in PUBLISHED:
        for name, value in row.values.items():
            assert name in ours or name.startswith("as_printed/") or name in (*LATENT_METRICS, "val_mse", "val_mae")
            assert not name.startswith("mini/") and isinstance(value, float) and 0 < value < 1
            assert name not in ours or ours[name].printed, f"{name} is in no paper's table"
        assert row.source and set(row.subjects) <= set(FOUR)


def test_what_the_paper_prints():
    """Copied by eye from tables 3 to 6."""
    gru = one(system="GRU", subjects=(1,), n_layers=31)
    assert gru.values == {
        "brain_diffuser/ssim_columns": 0.374, "brain_diffuser/pixcorr": 0.207, "brain_diffuser/alexnet2": 0.880,
        "brain_diffuser/alexnet5": 0.929, "brain_diffuser/inception": 0.890, "brain_diffuser/clip": 0.958,
        "brain_diffuser/effnet_b1_v1": 0.768, "brain_diffuser/swav": 0.416,
    }  # fmt: skip
    assert one(system="ridge (Brain-Diffuser)", subjects=FOUR).values["brain_diffuser/ssim_columns"] == 0.356
    errors = [row for row in PUBLISHED if "latent_mse" in row.values]
    assert {row.system: (row.values["latent_mse"], row.values["latent_mae"]) for row in errors} == {
        "conv": (0.0683, 0.1389), "transformer": (0.0685, 0.1389), "GRU": (0.0681, 0.1388),
        "ridge (Brain-Diffuser)": (0.0690, 0.1182),
    }  # fmt: skip
    noise = [row for row in PUBLISHED if row.noise_amplitude is not None]
    assert {row.noise_amplitude: row.values["brain_diffuser/ssim_columns"] for row in noise} == {
        0: 0.361, 8: 0.311, 16: 0.287, 32: 0.256, 64: 0.207, 256: 0.140,
    }  # fmt: skip
    assert one(noise_amplitude=256).values["brain_diffuser/swav"] == 0.435


def test_cautions_stand_where_they_must():
    assert "table 5" in one(noise_amplitude=0).caution and "pure noise" in one(noise_amplitude=256).caution
    assert "swapped" in one(system="Gu et al. 2022").caution
    assert "1,000 test images" in one(system="MindEye2", subjects=(1,)).caution
    for system in ("MindTuner", "Brain-IT"):
        assert one(system=system).caution.startswith("Second-hand")
    for row in PUBLISHED:
        assert row.caution
        if any(name.startswith("brain_diffuser/") for name in row.values):
            assert "assumed" in row.caution


@pytest.mark.parametrize("system", ["Lin et al. 2022", "Takagi & Nishimoto 2023", "Gu et al. 2022"])
def test_foreign_definitions_do_not_mix_with_ours(system):
    assert all(name.startswith("as_printed/") for name in one(system=system).values)
