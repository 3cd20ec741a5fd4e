"""Every setting of nsdray, as frozen dataclasses that refuse what cannot work. Standard library only.

A complete configuration is a recipe (`nsdray.recipes`); jobs let any field be overridden on the command line.
"""
from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, Literal

ALL_SUBJECTS = (1, 2, 3, 4, 5, 6, 7, 8)


def require(condition: bool, message: str) -> None:
    """Raise ValueError with the message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def digest(value: Any) -> str:
    """Short, stable hash of anything JSON can hold: how stages get their names."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:10]


@dataclass(frozen=True)
class StoreConfig:
    """Where results live."""

    root: str | None = None
    """Folder or s3:// URI of all data sets. None: $NSDRAY_ROOT, else ~/nsdray-data."""


@dataclass(frozen=True)
class DataConfig:
    """Which brain data to decode."""

    nsd_root: str | None = None
    """Folder that holds nsddata, nsddata_betas and nsddata_stimuli. None: the miniature NSD, which is SIMULATED and is
    written below the store's root when it is not there."""
    subjects: tuple[int, ...] = (1, 2, 5, 7)
    """NSD subjects, 1 to 8."""
    protocol: Literal["nsd37", "nsd40"] = "nsd40"
    """nsd37: sessions 1 to 37 (the paper, Brain-Diffuser). nsd40: all sessions of each subject."""
    rois: tuple[str, ...] = ("nsdgeneral",)
    """Voxels: union of these regions, e.g. nsdgeneral, V1, V1v, hV4, floc-faces, FFA-1."""
    beta_version: str = "betas_fithrf_GLMdenoise_RR"
    """Folder of the betas below func1pt8mm."""
    rows_per_part: int = 512
    """Images per Parquet part of samples and targets."""

    def __post_init__(self) -> None:
        require(
            len(self.subjects) > 0 and set(self.subjects) <= set(ALL_SUBJECTS),
            f"data.subjects is {self.subjects}; choose from {ALL_SUBJECTS}",
        )
        require(
            len(set(self.subjects)) == len(self.subjects), f"data.subjects names a subject twice: {self.subjects}"
        )
        require(len(self.rois) > 0, "data.rois is empty; give at least one region, e.g. nsdgeneral")
        require(self.rows_per_part >= 64, f"data.rows_per_part is {self.rows_per_part}, must be at least 64")


@dataclass(frozen=True)
class SimulationConfig:
    """The miniature NSD (used when data.nsd_root is None)."""

    n_train: int = 600
    """Training images of each subject."""
    n_test: int = 60
    """Test images, shared by all subjects."""
    n_sessions: int = 6
    """Sessions of each subject; (n_train + n_test) x 3 trials must divide by it."""
    noise_ceiling: float = 0.35
    """Median over voxels of the fraction of variance that is signal, for the mean of three repeats."""
    seed: int = 0
    """Another seed gives other scenes, other brains and other noise."""

    def __post_init__(self) -> None:
        require(0 < self.noise_ceiling < 1, f"simulation.noise_ceiling is {self.noise_ceiling}, must be in (0, 1)")


@dataclass(frozen=True)
class TargetsConfig:
    """VDVAE latents, the targets of stage 1."""

    vdvae: Literal["mini", "imagenet64"] = "mini"
    """mini: the small model in the package, trained on drawn scenes. imagenet64: OpenAI's model."""
    checkpoint: str | None = None
    """Checkpoint file of the VDVAE. None: the packaged one for mini, else
    <root>/checkpoints/imagenet64-iter-1600000-model-ema.th."""
    n_layers: int = 15
    """Layers to extract; a regressor may use fewer. 15 layers are 13,344 values, 31 are 91,168."""
    latents: Literal["sample", "mean"] = "sample"
    """Regression targets: a seeded sample of the posterior (as Brain-Diffuser) or its mean."""
    seed: int = 0
    """Seed of the posterior samples; the draw for an image depends on this and its image_id only."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the VDVAE's layers, for targets and pictures alike. bfloat16 (autocast) is faster where the hardware
    knows it, and alters posterior means by 1.3 % (rms; mini model, 15 layers)."""
    batch_size: int | None = None
    """Images per forward pass, for targets and pictures alike. Batches are padded to this size, so results do not depend
    on the number of replicas. None: what fits into half of the free memory, 64 at most."""

    def __post_init__(self) -> None:
        require(1 <= self.n_layers <= 75, f"targets.n_layers is {self.n_layers}, must be in 1..75")
        require(
            self.vdvae != "mini" or self.n_layers <= 31,
            f"targets.n_layers is {self.n_layers}, but the mini VDVAE has 31 layers",
        )
        require(
            self.batch_size is None or self.batch_size >= 1,
            f"targets.batch_size is {self.batch_size}, must be at least 1",
        )


@dataclass(frozen=True)
class ClipConfig:
    """CLIP tokens of pictures and captions, the targets of stage 2."""

    model: Literal["mini", "ViT-L-14"] = "mini"
    """mini: the small model in the package, trained on drawn scenes. ViT-L-14: OpenAI's, as Versatile Diffusion wants it."""
    checkpoint: str | None = None
    """Weight file with open_clip's parameter names. None: the packaged one for mini, else that of open_clip's cache."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of CLIP's layers (autocast)."""
    batch_size: int = 64
    """Pictures or captions per forward pass; batches are padded to this size."""

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, f"clip.batch_size is {self.batch_size}, must be at least 1")


Rescale = Literal["train_moments", "test_moments", "none"]


@dataclass(frozen=True)
class RidgeConfig:
    """Ridge regression in closed form, one alpha for all targets of a kind. CLIP tokens are always predicted by ridge."""

    alpha: float = 50_000.0
    """Penalty on z-scored betas for VDVAE latents. 50,000 for NSD's 15,724 voxels (paper, Brain-Diffuser)."""
    alpha_vision: float = 50_000.0
    """The same for CLIP's vision tokens (paper: 50,000; Brain-Diffuser's code: 60,000)."""
    alpha_text: float = 50_000.0
    """The same for CLIP's text tokens (paper: 50,000; Brain-Diffuser's code: 100,000)."""
    weights: Literal["none", "vdvae", "all"] = "vdvae"
    """Whose weights to write, for decoding new images. Test images are predicted without them; those of ViT-L/14's tokens
    would take 16 GB a subject."""
    rescale: Rescale = "train_moments"
    """Ridge predictions are shrunken; the VDVAE wants latents of full size. train_moments: from the moments of
    leave-one-out predictions to those of the training latents. test_moments: moments of the test predictions, as
    Brain-Diffuser does; it looks at the whole test set, for parity only. none: as predicted."""

    def __post_init__(self) -> None:
        for name in ("alpha", "alpha_vision", "alpha_text"):
            require(getattr(self, name) > 0, f"ridge.{name} is {getattr(self, name)}, must be positive")


@dataclass(frozen=True)
class GRUConfig:
    """The paper's GRU network and its training. Loss (MSE on standardised latents), optimiser and rates are not in the
    paper; they are nsdray's."""

    hidden: int = 100
    """Units per direction (paper: 100)."""
    dropout: float = 0.3
    """Dropout before the last layer."""
    learning_rate: float = 1e-3
    """Peak rate of AdamW, after a linear warm-up, before a cosine decay."""
    weight_decay: float = 0.01
    """AdamW's weight decay."""
    batch_size: int = 128
    """Images per step, over all workers."""
    n_epochs: int = 60
    """Most epochs to train."""
    warmup_epochs: int = 3
    """Epochs of linear warm-up."""
    patience: int = 10
    """Stop after so many epochs without a better validation loss."""
    clip_norm: float = 1.0
    """Largest norm of the gradient."""
    validation_fraction: float = 0.1
    """Share of the training images kept for validation (early stopping, train_moments); drawn by seed and image_id."""
    checkpoint_every: int = 5
    """Epochs between checkpoints; a killed run goes on from the last one."""
    rescale: Rescale = "train_moments"
    """As ridge.rescale, with the moments of predictions for the validation images."""

    def __post_init__(self) -> None:
        require(0 <= self.dropout < 1, f"gru.dropout is {self.dropout}, must be in [0, 1)")
        require(0 < self.validation_fraction < 0.5, f"gru.validation_fraction is {self.validation_fraction}, not in (0, 0.5)")
        for name in ("hidden", "learning_rate", "batch_size", "n_epochs", "patience", "clip_norm", "checkpoint_every"):
            require(getattr(self, name) > 0, f"gru.{name} is {getattr(self, name)}, must be positive")


@dataclass(frozen=True)
class Stage1Config:
    """Predicted latents to pictures."""

    temperature: float = 1.0
    """Factor on the standard deviation of the layers that are drawn from the prior."""
    deterministic: bool = False
    """Prior means and the most likely pixel instead of seeded draws."""
    seed: int = 0
    """Seed of all draws; the draw for an image depends on this and its image_id only."""


@dataclass(frozen=True)
class Stage2Config:
    """The stage-1 picture, refined by Versatile Diffusion under predicted CLIP tokens."""

    model: Literal["mini", "published", "none"] = "mini"
    """mini: the small model in the package, trained on drawn scenes. published: shi-labs/versatile-diffusion. none: stop
    after stage 1."""
    folder: str | None = None
    """Folder in diffusers' format. None: the packaged one for mini, else <root>/checkpoints/versatile-diffusion."""
    context: Literal["both", "vision", "text"] = "both"
    """Tokens to look at."""
    mixing: float = 0.4
    """Weight of the text's transformers beside the picture's 1 - mixing (paper, Brain-Diffuser: 0.4)."""
    start: Literal["stage1", "noise"] = "stage1"
    """Begin with the stage-1 picture, or with noise alone (which wants strength 1)."""
    strength: float = 0.75
    """Share of the steps that are run on the noised stage-1 picture (paper, Brain-Diffuser: 0.75)."""
    noise: float = 0.0
    """Factor of the N(0, 1) noise added to the stage-1 picture in 0..255, which is then clipped: for the study of how much
    stage 2 owes to stage 1 (paper, 3.4)."""
    guidance: float = 7.5
    """Classifier-free guidance (paper, Brain-Diffuser: 7.5)."""
    sampler: Literal["ddim", "unipc", "dpm"] = "ddim"
    """ddim with 50 steps as the paper; unipc and dpm need about 20 steps."""
    n_steps: int = 50
    """Steps of the full noise schedule."""
    reference_offset: bool = False
    """Start from the noise level one step above the first that is denoised, as Brain-Diffuser's scripts do."""
    seed: int = 0
    """Seed of all draws; the draw for an image depends on this and its image_id only."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of Versatile Diffusion. bfloat16 on GPUs that know it."""
    batch_size: int | None = None
    """Pictures per forward pass; batches are padded to this size. None: what fits into half of the free memory, 32 at most."""

    def __post_init__(self) -> None:
        for name in ("mixing", "strength"):
            require(0 <= getattr(self, name) <= 1, f"stage2.{name} is {getattr(self, name)}, must be in [0, 1]")
        require(
            self.start == "stage1" or self.strength == 1,
            f"stage2.start is noise, which wants --stage2.strength 1, but it is {self.strength}",
        )
        require(self.noise >= 0, f"stage2.noise is {self.noise}, must not be negative")
        require(self.n_steps >= 1, f"stage2.n_steps is {self.n_steps}, must be at least 1")
        require(
            self.batch_size is None or self.batch_size >= 1, f"stage2.batch_size is {self.batch_size}, must be at least 1"
        )


@dataclass(frozen=True)
class EvaluationConfig:
    """Scores of the test set."""

    suites: tuple[Literal["mini", "brain_diffuser", "mindeye"], ...] = ("mini",)
    """Sets of metrics: mini (pixels, and two-way identification by the mini CLIP), or those of Brain-Diffuser and of MindEye to
    the last detail of size, filter and weights (nsdray/metrics/perceptual.py)."""
    weights: str | None = None
    """Folder of the suites' weight files. None: torchvision's and open_clip's caches."""
    skip_missing: bool = False
    """Leave out metrics whose weights are not there, and say so in the table, instead of stopping."""
    controls: bool = True
    """Also reconstruct and score without the brain's help: from the mean training targets, and the nearest training image."""
    n_bootstrap: int = 2000
    """Resamples of the test images behind each interval."""
    seeds: tuple[int, ...] = ()
    """Further seeds (as --seed) to do everything with, so that the spread over trainings stands beside the intervals."""
    images: str | None = None
    """Reconstructions made elsewhere, to score instead of nsdray's (jobs/evaluate.py --images): a folder of pictures, one per
    test image, or a .pt or .npy file of all; {subject} in the name stands for the subject's number."""
    order: Literal["auto", "image_id", "first_seen", "sorted"] = "auto"
    """What these pictures are named or ordered by. image_id: 0-based 73k ids. first_seen: 0, 1, … in the order in which the
    subject first saw the test images (Brain-Diffuser). sorted: in ascending order of image_id (MindEye2). auto: image_id if the
    file names are these, else first_seen; sorted for a file."""

    def __post_init__(self) -> None:
        require(len(self.suites) > 0, "evaluation.suites is empty; choose mini, brain_diffuser or mindeye")
        require(len(set(self.seeds)) == len(self.seeds), f"evaluation.seeds names a seed twice: {self.seeds}")
        require(self.n_bootstrap >= 2, f"evaluation.n_bootstrap is {self.n_bootstrap}, must be at least 2")


@dataclass(frozen=True)
class ClusterConfig:
    """Use of the Ray cluster. None of this alters results, but for n_train_workers."""

    n_replicas: int | None = None
    """Model replicas (Ray actors). None: one per free GPU, without GPUs one per two free CPUs, at least 2 where there
    are 2 CPUs."""
    gpus_per_replica: float = 1.0
    """Share of a GPU per replica, on clusters that have GPUs."""
    n_gpus: int | None = None
    """GPUs to wait for at the start. A cluster that grows and shrinks is asked for them (cluster.yaml). None: those there are."""
    n_train_workers: int = 1
    """Ray Train workers per network; gradients are averaged over them."""
    cpus_per_train_worker: float = 1.0
    """CPUs reserved by a worker. Its Ray Data tasks reserve none, so that trainings cannot starve them."""
    max_retries: int = 3
    """Times a task, a replica or a training is started again after its process died."""

    def __post_init__(self) -> None:
        require(self.n_train_workers >= 1, f"cluster.n_train_workers is {self.n_train_workers}, must be at least 1")
        for name in ("n_replicas", "n_gpus"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"cluster.{name} is {value}, must be at least 1")
        for name in ("gpus_per_replica", "cpus_per_train_worker"):
            require(getattr(self, name) > 0, f"cluster.{name} is {getattr(self, name)}, must be positive")


@dataclass(frozen=True)
class Config:
    """A complete configuration."""

    recipe: str = "mini"
    """Name of the recipe this configuration started from."""
    models: tuple[Literal["ridge", "gru"], ...] = ("ridge", "gru")
    """Regressors to train, each from betas to the VDVAE latents of the first n_layers. Each gives a stage-1 picture, and with
    the tokens that ridge predicts a stage-2 picture."""
    n_layers: int = 15
    """VDVAE layers to predict; deeper ones are drawn from its prior."""
    seed: int = 0
    """Seed of initial weights, batches, dropout and the validation split."""
    data: DataConfig = field(default_factory=DataConfig)
    simulation: SimulationConfig = field(default_factory=SimulationConfig)
    targets: TargetsConfig = field(default_factory=TargetsConfig)
    clip: ClipConfig = field(default_factory=ClipConfig)
    ridge: RidgeConfig = field(default_factory=RidgeConfig)
    gru: GRUConfig = field(default_factory=GRUConfig)
    stage1: Stage1Config = field(default_factory=Stage1Config)
    stage2: Stage2Config = field(default_factory=Stage2Config)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def __post_init__(self) -> None:
        require(
            1 <= self.n_layers <= self.targets.n_layers,
            f"n_layers is {self.n_layers}, but targets.n_layers extracts only {self.targets.n_layers}; "
            "set --targets.n-layers at least as high",
        )
        require(len(self.models) > 0, "models is empty; choose ridge, gru or both")
        require(
            self.seed not in self.evaluation.seeds,
            f"evaluation.seeds holds {self.seed}, which is the seed itself; name further ones",
        )
        images, several = self.evaluation.images, len(self.data.subjects) > 1
        require(
            not (images and several) or "{subject" in images,
            f"{images} would be scored for each of the subjects {self.data.subjects}: choose one by --data.subjects, or say "
            "where each one's are by {subject}, as in results/subj{subject:02d}",
        )
        require(
            self.stage2.model == "none" or (self.stage2.model == "mini") == (self.clip.model == "mini"),
            f"stage2.model is {self.stage2.model}, but clip.model is {self.clip.model}: Versatile Diffusion looks at the tokens "
            "of the CLIP that it was trained with",
        )

    def settings(self, model: str) -> dict[str, Any]:
        """The fields of one regressor, as a plain dict."""
        return dataclasses.asdict(getattr(self, model))
