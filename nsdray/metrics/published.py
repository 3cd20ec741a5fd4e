"""Published results, under our metric names, each with its source and what to beware of.

Values are as printed; two-way scores are fractions. A name says by which suite's definition a figure was computed
(`nsdray.metrics.perceptual`): `as_printed/...` is neither of ours and stands beside them for orientation only. All are of
NSD, none of simulated data.
"""
from __future__ import annotations

from dataclasses import dataclass

HEADINGS = ("ssim", "pixcorr", "alexnet2", "alexnet5", "inception", "clip", "effnet_b", "swav")
FOUR = (1, 2, 5, 7)
NAMES = {  # the columns of the tables below, by the definition that computed them
    "brain_diffuser": {"ssim": "ssim_columns", "effnet_b": "effnet_b1_v1"},
    "mindeye": {"effnet_b": "effnet_b1_v2"},
    "as_printed": {},
}

PAPER_CAUTION = (
    "The paper does not say which SSIM and which EfficientNet weights it used; it takes its baseline's figures from "
    "Brain-Diffuser and Brain-Diffuser's Python version, so that suite is assumed."
)
TABLE_5_CAUTION = PAPER_CAUTION + " Mean of four subjects."
OTHERS_CAUTION = "Copied by the paper from the authors' own, whose definitions differ from both suites."
TABLE_6_CAUTION = (
    "The paper's text says subject 1, but the row without noise equals its mean of four subjects in table 5 (subject 1 in "
    "table 4: SSIM 0.370, PixCorr 0.242). " + PAPER_CAUTION
)
PURE_NOISE_CAUTION = "Amplitude 256, which the paper calls pure noise without a first stage. " + TABLE_6_CAUTION
SECOND_HAND_CAUTION = "Second-hand: verify in the original before printing it as fact. MindEye's suite is assumed."


@dataclass(frozen=True)
class Published:
    """One row of a published table."""

    system: str
    subjects: tuple[int, ...]
    """Subjects of NSD; several: the figures are their mean."""
    values: dict[str, float]
    """Metric's name to figure; what was not reported is absent."""
    source: str
    caution: str = ""
    n_layers: int | None = None
    """Latent layers of the VDVAE that were predicted. None: not said or not of this kind."""
    noise_amplitude: float | None = None
    """Factor of the N(0, 1) noise added to the stage-1 picture in 0..255. None: no noise study."""

    @property
    def label(self) -> str:
        """"GRU, 15 layers, subjects 1 2 5 7"."""
        layers = f", {self.n_layers} layers" if self.n_layers else ""
        noise = "" if self.noise_amplitude is None else f", noise {self.noise_amplitude:g}"
        return f"{self.system}{layers}{noise}, subjects {' '.join(map(str, self.subjects))}"


def _row(suite: str, figures: tuple[float | None, ...]) -> dict[str, float]:
    """Figures in the order of HEADINGS, under the suite's metric names."""
    assert len(figures) == len(HEADINGS)
    names = [f"{suite}/{NAMES[suite].get(heading, heading)}" for heading in HEADINGS]
    return {name: figure for name, figure in zip(names, figures) if figure is not None}


def _latent_errors() -> list[Published]:
    """Tables 2 and 3 (the GRU stands in both): validation MSE and MAE, test MSE and MAE, on raw latents."""
    names = ("val_mse", "val_mae", "latent_mse", "latent_mae")
    rows = {
        "conv": (0.0687, 0.1392, 0.0683, 0.1389),
        "transformer": (0.0690, 0.1392, 0.0685, 0.1389),
        "GRU": (0.0685, 0.1390, 0.0681, 0.1388),
        "ridge (Brain-Diffuser)": (0.0695, 0.1184, 0.0690, 0.1182),
    }
    caution = "The loss and the latents' scaling are not in the paper."
    return [
        Published(system, (1,), dict(zip(names, row)), "paper, tables 2 and 3", caution, n_layers=15)
        for system, row in rows.items()
    ]


def _subject_1() -> list[Published]:
    rows = [
        ("ridge (Brain-Diffuser)", 15, (0.358, 0.286, 0.935, 0.962, 0.881, 0.925, 0.772, 0.413)),
        ("ridge (Brain-Diffuser)", 31, (0.367, 0.305, 0.967, 0.974, 0.878, 0.925, 0.768, 0.415)),
        ("GRU, CLIP predicted by the GRU network", 15, (0.357, 0.230, 0.870, 0.922, 0.860, 0.916, 0.778, 0.437)),
        ("GRU", 15, (0.370, 0.242, 0.904, 0.942, 0.868, 0.924, 0.779, 0.421)),
        ("GRU", 31, (0.374, 0.207, 0.880, 0.929, 0.890, 0.958, 0.768, 0.416)),
    ]
    return [
        Published(system, (1,), _row("brain_diffuser", row), "paper, table 4", PAPER_CAUTION, n_layers=n_layers)
        for system, n_layers, row in rows
    ]


def _four_subjects() -> list[Published]:
    source, swapped = "paper, table 5", " Its SSIM and PixCorr look swapped against later papers."
    others = [
        ("Lin et al. 2022", (None, None, None, None, 0.782, None, None, None), ""),
        ("Takagi & Nishimoto 2023", (None, None, 0.830, 0.830, 0.760, 0.770, None, None), ""),
        ("Gu et al. 2022", (0.150, 0.325, None, None, None, None, 0.862, 0.465), swapped),
    ]
    ours = [
        ("ridge (Brain-Diffuser)", 31, (0.356, 0.254, 0.942, 0.962, 0.872, 0.915, 0.775, 0.423)),
        ("GRU", 15, (0.361, 0.202, 0.878, 0.931, 0.862, 0.914, 0.786, 0.434)),
        ("GRU", 31, (0.360, 0.177, 0.864, 0.923, 0.869, 0.922, 0.785, 0.434)),
    ]
    return [
        *(Published(system, FOUR, _row("as_printed", row), source, OTHERS_CAUTION + more) for system, row, more in others),
        *(
            Published(system, FOUR, _row("brain_diffuser", row), source, TABLE_5_CAUTION, n_layers=n_layers)
            for system, n_layers, row in ours
        ),
    ]


def _noise() -> list[Published]:
    """Table 6: noise on the stage-1 picture."""
    rows = {
        0: (0.361, 0.202, 0.878, 0.931, 0.862, 0.914, 0.786, 0.434),
        8: (0.311, 0.197, 0.907, 0.948, 0.879, 0.946, 0.767, 0.400),
        16: (0.287, 0.191, 0.903, 0.946, 0.870, 0.946, 0.773, 0.401),
        32: (0.256, 0.180, 0.894, 0.944, 0.866, 0.949, 0.759, 0.409),
        64: (0.207, 0.167, 0.864, 0.950, 0.877, 0.954, 0.755, 0.410),
        256: (0.140, 0.090, 0.783, 0.924, 0.907, 0.939, 0.766, 0.435),
    }
    return [
        Published(
            "GRU", (1,), _row("brain_diffuser", row), "paper, table 6",
            PURE_NOISE_CAUTION if amplitude == 256 else TABLE_6_CAUTION, n_layers=15, noise_amplitude=amplitude,
        )
        for amplitude, row in rows.items()
    ]


def _later_systems() -> list[Published]:
    """Newer than the paper."""
    source = "printed in the authors' own repository"
    subject_1 = [
        ("MindEye", (0.3467, 0.3925, 0.9738, 0.9865, 0.9453, 0.9434, 0.6345, 0.3578), "982 test images."),
        (
            "MindEye2", (0.4395, 0.3740, 0.9791, 0.9911, 0.9600, 0.9369, 0.6075, 0.3363),
            "40 sessions, 1,000 test images: not the same split. Scores of 0.75 x enhanced + 0.25 x blurry reconstruction.",
        ),
    ]
    four = [
        ("MindEye2", (0.431, 0.322, 0.961, 0.986, 0.954, 0.930, 0.619, 0.344)),
        ("MindTuner", (0.421, 0.322, 0.958, 0.988, 0.956, 0.938, 0.612, 0.340)),
        ("Brain-IT", (0.486, 0.386, 0.984, 0.995, 0.973, 0.964, 0.564, 0.320)),
    ]
    return [
        *(Published(system, (1,), _row("mindeye", row), source, caution) for system, row, caution in subject_1),
        *(Published(system, FOUR, _row("mindeye", row), "second-hand", SECOND_HAND_CAUTION) for system, row in four),
    ]


PUBLISHED = (*_latent_errors(), *_subject_1(), *_four_subjects(), *_noise(), *_later_systems())
