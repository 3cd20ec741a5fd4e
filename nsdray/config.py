"""Every setting of nsdray, as frozen dataclasses that refuse what cannot work. Standard library only.

A complete configuration is a recipe (`nsdray.recipes`); jobs let any field be overridden on the command line.
"""
from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

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
    with_bold: bool = False
    """Also write runs of BOLD that the betas can be estimated from (jobs/estimate_betas.py)."""

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
    """Images per forward pass, for targets and pictures alike. Batches are padded to this size, so that results are equal to
    the bit whatever the number of replicas; with another size they are equal to rounding. None: the largest power of two up to
    32 that fits into half of a replica's share of the memory (of its GPU, or a CPU's share of the machine or container), so
    name a size where results of unlike machines must be equal to the bit."""

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
Model = Literal[
    "ridge", "gru", "conv", "transformer", "mlp", "shared-gru", "shared-conv", "shared-transformer", "shared-mlp"
]
SHARED = "shared-"
"""Before a network's name: one model for all subjects, an input layer for each and all else in common."""


@dataclass(frozen=True)
class RidgeConfig:
    """Ridge regression in closed form."""

    alpha: float = 50_000.0
    """Penalty on z-scored betas for VDVAE latents. 50,000 for NSD's 15,724 voxels (paper, Brain-Diffuser)."""
    alpha_vision: float = 50_000.0
    """The same for CLIP's vision tokens (paper: 50,000; Brain-Diffuser's code: 60,000)."""
    alpha_text: float = 50_000.0
    """The same for CLIP's text tokens (paper: 50,000; Brain-Diffuser's code: 100,000)."""
    alphas: tuple[float, ...] = ()
    """Alphas to choose from by leave-one-out error, for every kind of targets, instead of the three above. Empty: those three.
    Costs one eigendecomposition a subject, some 30 times a Cholesky factor."""
    per_target: bool = False
    """Choose an alpha for each target, instead of one for all targets of a kind."""
    selection: Literal["sample", "gcv", "all"] = "sample"
    """How alphas and penalties are compared. sample: leave-one-out on a seeded sample of about as many training images as
    there are test images. gcv: generalised cross-validation, cheaper from some 9 alphas on. all: leave-one-out on all training
    images, some 9 times the work of the sample."""
    n_targets_search: int = 8192
    """Targets of a kind, drawn by the seed, on which a shared alpha and penalties of voxel groups are chosen."""
    groups: tuple[str, ...] = ()
    """Voxel groups, by ROI name, e.g. V1 V2 V3 hV4 floc-faces floc-places: the report then shows which of them predicts which
    layer or token, and they may have penalties of their own. A voxel belongs to the first group that has it; voxels in none are
    the group "rest"."""
    penalties: tuple[float, ...] = ()
    """Factors on alpha, one per group in the order of groups and a last one for the rest (banded ridge). Empty: 1 for all."""
    n_penalties_drawn: int = 0
    """Further sets of such factors, drawn by the seed; each kind of targets takes the set with the least leave-one-out error. A
    set costs a kernel and an eigendecomposition."""
    held_out: Literal["sample", "all", "none"] = "sample"
    """Training images whose leave-one-out predictions train_moments comes from: selection's sample, or all (9 times the work).
    none: half the work, for the other ways to rescale; there is no leave-one-out R2 then."""
    dtype: Literal["float32", "float64"] = "float32"
    """Precision of the kernel, its factors and all products. float64 takes twice the time and memory."""
    weights: Literal["none", "vdvae", "all"] = "vdvae"
    """Whose weights to write, for decoding new images. Test images are predicted without them."""
    coefficients: Literal["dual", "primal"] = "dual"
    """What is written as weights. dual: a matrix of training images and voxels, and the training targets that it is multiplied
    with, as float16; for NSD 0.6 GB and 0.24 GB (15 layers) or 1.6 GB (31), and a fifth more operations than without (with
    ridge.per_target dual coefficients, twice the size, and twice the operations). primal: one per voxel and target, 0.8 GB or
    5.7 GB, three times the operations for 31 layers; decoding many images is faster then."""
    rescale: Rescale = "train_moments"
    """Ridge predictions are shrunken; the VDVAE wants latents of full size. train_moments: from the moments of
    leave-one-out predictions to those of the training latents. test_moments: moments of the test predictions, as
    Brain-Diffuser does; it looks at the whole test set, for parity only. none: as predicted."""

    def __post_init__(self) -> None:
        for name in ("alpha", "alpha_vision", "alpha_text"):
            require(getattr(self, name) > 0, f"ridge.{name} is {getattr(self, name)}, must be positive")
        require(all(a > 0 for a in self.alphas), f"ridge.alphas is {self.alphas}; all must be positive")
        require(len(set(self.alphas)) == len(self.alphas), f"ridge.alphas names an alpha twice: {self.alphas}")
        require(
            not self.per_target or len(self.alphas) > 1,
            f"ridge.per_target chooses from a grid: give at least two --ridge.alphas (now {self.alphas})",
        )
        require(
            self.held_out != "none" or self.rescale != "train_moments",
            "ridge.held_out is none, but ridge.rescale train_moments needs leave-one-out predictions: --ridge.held-out sample",
        )
        require(self.n_targets_search >= 1, f"ridge.n_targets_search is {self.n_targets_search}, must be at least 1")
        require(len(set(self.groups)) == len(self.groups), f"ridge.groups names a group twice: {self.groups}")
        require(
            not self.penalties or len(self.penalties) == len(self.groups) + 1 > 1,
            f"ridge.penalties has {len(self.penalties)} values for {len(self.groups)} ridge.groups; give one for each and a last "
            "one for all other voxels",
        )
        require(all(k > 0 for k in self.penalties), f"ridge.penalties is {self.penalties}; all must be positive")
        require(
            self.n_penalties_drawn == 0 or (self.n_penalties_drawn > 0 and len(self.groups) > 0),
            f"ridge.n_penalties_drawn is {self.n_penalties_drawn}; it must not be negative and needs --ridge.groups",
        )


@dataclass(frozen=True)
class TrainingConfig:
    """How a network is trained. Loss (MSE on standardised latents), optimiser and rates are not in the paper; they are
    nsdray's. Each network's own settings add its sizes."""

    name: ClassVar[str]

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
    sampling: Literal["mean", "trial", "mixture"] = "mean"
    """Betas of a training image: the mean over its repeats, one repeat drawn anew each epoch, or a mixture of them with random
    weights. Validation and test images are always means."""
    validation_fraction: float = 0.1
    """Share of the training images kept for validation (early stopping, train_moments); drawn by seed and image_id."""
    checkpoint_every: int = 5
    """Epochs between checkpoints; a killed run goes on from the last one."""
    rescale: Rescale = "train_moments"
    """As ridge.rescale, with the moments of predictions for the validation images."""
    pretrained: str | None = None
    """Folder of a decoder (models/…/subject=NN) of the same network and VDVAE layers, best of a shared one: fine-tune everything
    above its input layer, and learn the input layer anew. None: start from nothing, as networks for CLIP's tokens always do."""
    trunk_rate: float = 0.1
    """Fine-tuning: factor on the learning rate above the input layer; 0 freezes it."""

    def __post_init__(self) -> None:
        sizes = self.sizes()
        require(0 <= sizes["dropout"] < 1, f"{self.name}.dropout is {sizes['dropout']}, must be in [0, 1)")
        require(
            0 < self.validation_fraction < 0.5,
            f"{self.name}.validation_fraction is {self.validation_fraction}, not in (0, 0.5)",
        )
        require(0 <= self.trunk_rate <= 1, f"{self.name}.trunk_rate is {self.trunk_rate}, must be in [0, 1]")
        training = ("learning_rate", "batch_size", "n_epochs", "patience", "clip_norm", "checkpoint_every")
        for name in (*training, *(name for name in sizes if name != "dropout")):
            require(getattr(self, name) > 0, f"{self.name}.{name} is {getattr(self, name)}, must be positive")

    def sizes(self) -> dict[str, Any]:
        """Arguments of the network beside its numbers of voxels and targets."""
        training = {f.name for f in dataclasses.fields(TrainingConfig)}
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in training}


@dataclass(frozen=True)
class GRUConfig(TrainingConfig):
    """The paper's GRU network."""

    name: ClassVar[str] = "gru"

    hidden: int = 100
    """Units per direction (paper: 100)."""
    dropout: float = 0.3
    """Dropout before the last layer."""


@dataclass(frozen=True)
class ConvConfig(TrainingConfig):
    """The paper's convolutional network."""

    name: ClassVar[str] = "conv"

    hidden: int = 100
    """Units per direction of both GRUs; even."""
    dropout: float = 0.3
    """Dropout before the last layer."""
    channels: int = 16
    """Channels of the first convolution; the second has twice as many."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.hidden % 2 == 0, f"conv.hidden is {self.hidden}, must be even")


@dataclass(frozen=True)
class TransformerConfig(TrainingConfig):
    """The paper's transformer network."""

    name: ClassVar[str] = "transformer"

    hidden: int = 100
    """Units per direction of both GRUs; even."""
    dropout: float = 0.3
    """Dropout before the last layer."""
    width: int = 32
    """Values of a token; a multiple of n_heads."""
    n_heads: int = 4
    """Attention heads."""
    n_blocks: int = 2
    """Transformer blocks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.hidden % 2 == 0, f"transformer.hidden is {self.hidden}, must be even")
        require(
            self.width % self.n_heads == 0,
            f"transformer.width is {self.width}, must be a multiple of transformer.n_heads, {self.n_heads}",
        )


@dataclass(frozen=True)
class MLPConfig(TrainingConfig):
    """A plain multilayer perceptron, without batch statistics."""

    name: ClassVar[str] = "mlp"

    hidden: int = 416
    """Units of a hidden layer; 416 give about as many parameters as the GRU network has."""
    dropout: float = 0.3
    """Dropout after each hidden layer."""
    n_hidden_layers: int = 2
    """Hidden layers."""


@dataclass(frozen=True)
class Stage1Config:
    """Predicted latents to pictures."""

    temperature: float = 1.0
    """Factor on the standard deviation of the layers that are drawn from the prior."""
    deterministic: bool = False
    """No draws: prior means, and for each pixel the mode of the heaviest component of the output's mixture."""
    seed: int = 0
    """Seed of all draws; the draw for an image depends on this and its image_id only."""

    def __post_init__(self) -> None:
        require(self.temperature >= 0, f"stage1.temperature is {self.temperature}, must not be negative")


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
    """Pictures per forward pass; batches are padded to this size. None: what fits, as of targets.batch_size, beside the weights;
    8 at most."""

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
    ceiling: bool = True
    """Also reconstruct from the true latents and tokens, once for all models: the most that stages 1 and 2 could reach."""
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
class SearchConfig:
    """A search over networks, depths, widths and training settings (jobs/search.py); nothing else reads this."""

    name: str | None = None
    """Folder of the search below <root>/searches. None: the recipe's name."""
    models: tuple[Literal["gru", "conv", "transformer", "mlp"], ...] = ("gru", "conv", "transformer", "mlp")
    """Networks to try. Each starts from its own settings in this configuration."""
    n_layers: tuple[int, ...] = (2, 6, 14, 15, 23, 31)
    """VDVAE layers to predict, any from 1 to 75 (31 for the mini VDVAE). The deepest decides what lies in Ray's object store: for
    9,000 images of a subject 1.6 GB of latents for 31 layers, 26 GB for 75, and 0.6 GB of betas."""
    width: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Factors on the network's hidden units."""
    dropout: tuple[float, float] = (0.2, 0.8)
    """Range of the dropout."""
    learning_rate: tuple[float, float] = (5e-4, 1e-2)
    """Range of the learning rate, searched on a logarithmic scale."""
    n_trials: int = 24
    """Trials in all. The first are one per depth with the first network as it is configured; these train to their end, so that
    depths can be compared."""
    n_epochs: int | None = None
    """Most epochs of a trial, and of the best configuration that is written. None: each network's own n_epochs."""
    n_images: int = 48
    """Validation images of each subject whose stage-1 pictures are scored."""
    grace_epochs: int = 12
    """Epochs that every trial may train; then, but for the first of each depth, only the best 1 / reduction go on, and so on
    (ASHA)."""
    reduction: int = 2
    """See grace_epochs."""
    per_subject: bool = False
    """One search per subject, instead of trials that train a network for each subject and are judged by their mean."""
    cpus_per_trial: float = 1.0
    """CPUs of a trial."""
    gpus_per_trial: float = 0.25
    """Share of a GPU of a trial, on clusters that have GPUs."""

    def __post_init__(self) -> None:
        for name in ("models", "n_layers", "width"):
            require(len(getattr(self, name)) > 0, f"search.{name} is empty")
        impossible = [n for n in self.n_layers if not 1 <= n <= 75]
        require(not impossible, f"search.n_layers has {impossible}; the VDVAE's layers are 1 to 75")
        low, high = self.dropout
        require(0 <= low <= high < 1, f"search.dropout is {self.dropout}, must be a range within [0, 1)")
        low, high = self.learning_rate
        require(0 < low <= high, f"search.learning_rate is {self.learning_rate}, must be a range above 0")
        for name in ("n_trials", "n_epochs", "grace_epochs", "cpus_per_trial", "gpus_per_trial"):
            value = getattr(self, name)
            require(value is None or value > 0, f"search.{name} is {value}, must be positive")
        require(self.n_images >= 2, f"search.n_images is {self.n_images}, must be at least 2: scores vary over images")
        require(self.reduction >= 2, f"search.reduction is {self.reduction}, must be at least 2")


@dataclass(frozen=True)
class ClusterConfig:
    """Use of the Ray cluster. None of this alters results, but for n_train_workers; gpus_per_replica alters
    the rounding where a batch size follows it."""

    n_replicas: int | None = None
    """Model replicas (Ray actors). None: one per free GPU. Without GPUs each computes on one CPU, since the number of threads
    would alter the rounding: one per CPU while there are 8 GiB for each, one per two CPUs in any case, at least 2 where there
    are 2 CPUs."""
    gpus_per_replica: float = 1.0
    """Share of a GPU per replica, on clusters that have GPUs. Batch sizes that are None follow it."""
    n_gpus: int | None = None
    """GPUs to wait for at the start. A cluster that grows and shrinks is asked for them (cluster.yaml). None: those there are."""
    n_train_workers: int = 1
    """Ray Train workers per network; gradients are averaged over them. Without dropout and batch statistics any number gives the
    same losses, to rounding; with them, each worker has its own dropout and normalises by its own share of a batch."""
    cpus_per_train_worker: float = 1.0
    """CPUs reserved by a worker. Its Ray Data tasks reserve none, so that trainings cannot starve them."""
    max_retries: int = 3
    """Times a replica or a training is started again after its process died. A replica that has used them up is replaced, once a
    shard; other tasks are tried again as often as Ray does by itself, three times."""

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
    models: tuple[Model, ...] = ("ridge", "gru")
    """Regressors to train, each from betas to the VDVAE latents of the first n_layers. Each gives a stage-1 picture, and with
    the tokens that token_model predicts a stage-2 picture. shared-…: one network for all subjects, an input layer for each."""
    token_model: Model = "ridge"
    """What predicts CLIP's tokens, whichever model predicts the latents. A network predicts all tokens of a kind at once."""
    n_layers: int = 15
    """VDVAE layers to predict; deeper ones are drawn from its prior."""
    seed: int = 0
    """Seed of initial weights, batches, drawn repeats, dropout and the validation split."""
    data: DataConfig = field(default_factory=DataConfig)
    simulation: SimulationConfig = field(default_factory=SimulationConfig)
    targets: TargetsConfig = field(default_factory=TargetsConfig)
    clip: ClipConfig = field(default_factory=ClipConfig)
    ridge: RidgeConfig = field(default_factory=RidgeConfig)
    gru: GRUConfig = field(default_factory=GRUConfig)
    conv: ConvConfig = field(default_factory=ConvConfig)
    transformer: TransformerConfig = field(default_factory=TransformerConfig)
    mlp: MLPConfig = field(default_factory=MLPConfig)
    stage1: Stage1Config = field(default_factory=Stage1Config)
    stage2: Stage2Config = field(default_factory=Stage2Config)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def __post_init__(self) -> None:
        require(self.n_layers >= 1, f"n_layers is {self.n_layers}, must be at least 1")
        require(
            self.n_layers <= self.targets.n_layers,
            f"n_layers is {self.n_layers}, but targets.n_layers extracts only {self.targets.n_layers}; "
            "set --targets.n-layers at least as high",
        )
        require(len(self.models) > 0, "models is empty; choose ridge, gru or both")
        shared = [model for model in (*self.models, self.token_model) if model.startswith(SHARED)]
        require(
            not shared or len(self.data.subjects) > 1,
            f"{', '.join(shared)}: a shared model wants several subjects, data.subjects has one; add some, or fine-tune a "
            "shared model to it by its network's pretrained",
        )
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
        return dataclasses.asdict(getattr(self, model.removeprefix(SHARED)))


@dataclass(frozen=True)
class BIDSConfig:
    """A lab's own data set, in BIDS."""

    root: str | None = None
    """Folder that holds sub-*/[ses-*/]func/*_events.tsv (onset, duration and stim_file). None: the data are NSD's."""
    bold: str | None = None
    """Folder of the preprocessed runs, sub-*/[ses-*/]func/*_bold.nii.gz, such as fMRIPrep's derivatives. None: root."""
    task: str | None = None
    """Only runs of this task. None: all runs whose events name pictures."""
    space: str | None = None
    """Only runs in this space (their space- entity). None: whatever there is, if there is one version of each run."""
    participants: tuple[str, ...] | None = None
    """Labels, 01 for sub-01. None: all; there may be eight."""
    mask: str | None = None
    """NIfTI volume of the voxels to decode from, on the grid of the runs; {participant} stands for the label. The fit itself
    takes all voxels, for its noise pool. It becomes the ROI nsdgeneral, which jobs read by default."""
    stimuli: str | None = None
    """Folder that stim_file is relative to. None: <root>/stimuli."""
    captions: str | None = None
    """JSON file {stim_file: [caption, ...]}. None: no captions; then decode with --stage2.context vision."""
    test_images: str | None = None
    """File that names the test images, a stim_file a line. All their repeats are kept from whatever is fitted."""
    n_test_images: int | None = None
    """In place of such a file: as many, drawn by the seed from the pictures that every participant saw."""
    picture_size: int | None = None
    """Pixels a side; a picture's middle square is taken. None: the smallest picture's shorter side, 425 at most."""
    seed: int = 0
    """Seed of the drawn test images."""

    def __post_init__(self) -> None:
        if self.root is None:
            return
        require(
            (self.test_images is None) != (self.n_test_images is None),
            "which images are test images must be said: give --bids.test-images FILE, or --bids.n-test-images N (one of the two)",
        )
        require(self.mask is not None, "which voxels to decode from must be said: give --bids.mask FILE, on the grid of the runs")


@dataclass(frozen=True)
class GLMConfig:
    """BOLD to single-trial betas (jobs/estimate_betas.py)."""

    nsd_root: str | None = None
    """Folder that holds NSD's nsddata and nsddata_timeseries. None: the data set of bids.root, or else the miniature NSD
    with BOLD, which is SIMULATED."""
    bids: BIDSConfig = field(default_factory=BIDSConfig)
    output: str | None = None
    """Folder to write in NSD's layout. None, for NSD: into nsd_root. It must be given for BIDS, and cannot for the miniature."""
    subjects: tuple[int, ...] | None = None
    """NSD subjects. None: all that have time series; for the miniature 1, 2, 5, 7."""
    sessions: tuple[int, ...] | None = None
    """NSD sessions. None: all that have time series."""
    beta_version: str | None = None
    """Folder of the betas. None: NSD's name for this type of betas; in nsd_root with _nsdray at its end."""
    beta_type: Literal["B", "C", "D"] = "D"
    """B: the HRF that fits each voxel best (NSD's b2; with hrf assumed, b1). C: B with noise regressors. D: C with fractional
    ridge regression (NSD's b3). Without repeats across runs, C and D cannot be cross-validated, and B is written."""
    hrf: Literal["library", "assumed"] = "library"
    """library: the best of 20 for each voxel. assumed: the canonical one for all."""
    noise_pool: Literal["on_off", "negative_r2"] = "on_off"
    """Voxels that noise regressors come from. on_off: the variance that one response to all trials explains is small, as in
    GLMsingle. negative_r2: the cross-validated variance explained is negative, as in the paper."""
    max_regressors: int = 10
    """Noise regressors tried at most."""
    sessions_together: bool = False
    """Fit all sessions of a subject at once, for experiments that repeat pictures across sessions only. False: each alone, as
    for NSD's betas."""
    tr: float | None = None
    """Seconds between volumes, in place of what the BIDS files say."""
    stimulus_duration: float | None = None
    """Seconds, in place of what the events say."""
    chunk_voxels: int | None = None
    """Voxels that a task works on. None: as many as need about 256 MB."""
    simulation: SimulationConfig = field(default_factory=lambda: SimulationConfig(with_bold=True))
    store: StoreConfig = field(default_factory=StoreConfig)
    """Where time series and betas of a session lie while it is worked on."""

    def __post_init__(self) -> None:
        require(
            self.nsd_root is None or self.bids.root is None,
            f"both nsd_root ({self.nsd_root}) and bids.root ({self.bids.root}) are given; choose one",
        )
        require(
            self.bids.root is None or self.output is not None,
            "where to write a BIDS data set must be said: give --output FOLDER, which is then the --data.nsd-root of other jobs",
        )
        require(
            self.output is None or self.nsd_root is not None or self.bids.root is not None,
            f"output is {self.output}, but betas of the miniature NSD are written into it, where other jobs look for them; leave "
            "it out, or give --nsd-root or --bids.root",
        )
        for name in ("subjects", "sessions"):
            require(
                getattr(self, name) is None or self.bids.root is None,
                f"{name} are NSD's; choose from a BIDS data set by --bids.participants",
            )
        require(self.subjects is None or set(self.subjects) <= set(ALL_SUBJECTS), f"subjects is {self.subjects}")
        require(self.max_regressors >= 1, f"max_regressors is {self.max_regressors}, must be at least 1")
        require(self.chunk_voxels is None or self.chunk_voxels >= 1, f"chunk_voxels is {self.chunk_voxels}, must be at least 1")
        require(self.bids.root is not None or self.tr is None, "tr is known for NSD; it may be given for BIDS only")
        require(
            self.bids.root is not None or self.stimulus_duration is None,
            "stimulus_duration is known for NSD (3 s); it may be given for BIDS only",
        )

    @property
    def nsd_name(self) -> str:
        """NSD's name for betas of this type."""
        hrf = {"library": "fithrf", "assumed": "assumehrf"}[self.hrf]
        return f"betas_{hrf}" + {"B": "", "C": "_GLMdenoise", "D": "_GLMdenoise_RR"}[self.beta_type]
