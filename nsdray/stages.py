"""Which stages a configuration has, what each is made from, and what is still missing. Reads headers only.

The folder of a stage is shared by all subjects; what is particular to a subject (its files, its voxels) is in the
inputs of its shards. So one more subject or session redoes nothing that it does not alter.
"""
from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from nsdray.config import SHARED, Config, SimulationConfig, digest
from nsdray.metrics.foreign import ForeignPictures, find_pictures
from nsdray.metrics.perceptual import Metric, find_suite
from nsdray.metrics.table import N_POOL
from nsdray.mini import VERSATILE_DIFFUSION, weights_path
from nsdray.models.backbones import BACKBONES
from nsdray.models.backbones import weights_file as backbone_weights
from nsdray.models.checkpoint import weights_file
from nsdray.models.clip import CLIPConfig, published_checkpoint
from nsdray.models.vdvae import VDVAEConfig
from nsdray.nsd.betas import session_shape
from nsdray.nsd.design import Trials, planned_trials, protocol_sessions, shared_images, trials
from nsdray.nsd.layout import CAPTION_SPLITS, NSDLayout
from nsdray.nsd.rois import Voxels, load_voxels
from nsdray.nsd.simulate import simulate_nsd
from nsdray.nsd.simulate_bold import DRIFT_SD, OWN_SD, SHARED_SD, TRIAL_NOISE
from nsdray.store import Inputs, Stage, Store, resolve_root, subject_folder

PUBLISHED_VDVAE = "imagenet64-iter-1600000-model-ema.th"
PUBLISHED_DIFFUSION = "versatile-diffusion"
VDVAE_CONFIGS = {"mini": VDVAEConfig.mini, "imagenet64": VDVAEConfig.imagenet64}
CLIP_CONFIGS = {"mini": CLIPConfig.mini, "ViT-L-14": CLIPConfig.published}
KINDS = ("vdvae", "clip_vision", "clip_text")
"""Kinds of regression targets."""
CONTROLS = ("mean", "nearest", "vae")
"""What decodes without the brain's help, or without decoding: the mean training target, whatever the betas; the training image
whose embedding is nearest to the predicted one; and the seen picture itself, through the VAE of stage 2 and back."""
STAGE2_ONLY = ("nearest", "vae")
IMAGES = "images"
"""Reconstructions made elsewhere: as a model, and as the stage of its pictures."""
ROWS_PER_PICTURES = 64
"""Test images per shard of pictures: the unit that a replica works on and that a restart may lose."""


def file_digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal; computed anew only when its size or time has changed."""
    stat = path.stat()
    return _file_digest(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=64)  # plans of noise levels and seeds share gigabytes of weights
def _file_digest(path: Path, _size: int, _mtime_ns: int) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def file_size(path: Path) -> int:
    """Size in bytes; FileNotFoundError says what the file is."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there. NSD has a file of that name; fetch it, or correct --data.nsd-root.")
    return path.stat().st_size


def layer_name(layer: int) -> str:
    """Column of a VDVAE layer: "layer_07" for 7."""
    return f"layer_{layer:02d}"


def token_names(n_tokens: int) -> list[str]:
    """Columns of CLIP tokens: "token_000" … of 257, "token_00" … of 77."""
    return [f"token_{i:0{len(str(n_tokens - 1))}d}" for i in range(n_tokens)]


@dataclass(frozen=True)
class Fit:
    """A regressor and what it predicts."""

    regressor: str
    """"ridge", a network's name, that with "shared-" before it: one model for all subjects, or "mean": the mean of the training
    targets, whatever the betas."""
    kind: str
    """One of KINDS."""

    @property
    def is_shared(self) -> bool:
        return self.regressor.startswith(SHARED)

    @property
    def network(self) -> str:
        """Name in REGRESSORS."""
        return self.regressor.removeprefix(SHARED)


def without(settings: Any, *names: str) -> dict[str, Any]:
    """Fields of a settings dataclass but for some that do not alter results."""
    return {name: value for name, value in dataclasses.asdict(settings).items() if name not in names}


def local_home(store: Store) -> Path:
    """A local folder for what cannot lie in an object store."""
    return Path(store.base if store.is_local else "~/nsdray-data").expanduser()


def miniature_nsd(store: Store, simulation: SimulationConfig, subjects: Sequence[int]) -> Path:
    """The miniature NSD of these settings, which is written when it is not there."""
    settings = dataclasses.asdict(simulation)
    if not simulation.with_bold:
        del settings["with_bold"]  # as if the setting did not exist: the same folder, the same bytes
    noise = {"bold": (TRIAL_NOISE, SHARED_SD, OWN_SD, DRIFT_SD)} if simulation.with_bold else {}
    folder = local_home(store) / f"miniature-nsd-{digest(settings | noise)}"
    simulate_nsd(folder, subjects=subjects, **settings)
    return folder


class Plan:
    """All stages of a configuration, for all its subjects."""

    def __init__(self, config: Config):
        self.config = config
        self.store = Store(resolve_root(config.store.root))
        self.is_simulated = config.data.nsd_root is None
        if self.is_simulated:
            root = miniature_nsd(self.store, config.simulation, config.data.subjects)
        else:
            root = Path(config.data.nsd_root).expanduser().resolve()
        self.layout = NSDLayout(root, beta_version=config.data.beta_version)
        self.subjects = [SubjectPlan(self, subject) for subject in config.data.subjects]

    @cached_property
    def shared_images(self) -> np.ndarray:
        """All images that may be test images, int32 (n,): their targets are made once, whoever saw which of them."""
        return shared_images(self.layout)

    @cached_property
    def vdvae_checkpoint(self) -> Path:
        """The VDVAE's weight file; FileNotFoundError says where to get it."""
        targets = self.config.targets
        if targets.checkpoint is not None:
            path = Path(targets.checkpoint).expanduser().resolve()
        elif targets.vdvae == "mini":
            path = weights_path("vdvae")
        else:
            path = local_home(self.store) / "checkpoints" / PUBLISHED_VDVAE
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is not there. The VDVAE needs {PUBLISHED_VDVAE} (0.5 GB): the README of github.com/openai/vdvae "
                "links to it (ImageNet 64 x 64, EMA model). Put it there, or say --targets.checkpoint FILE. "
                "Without it: the recipe mini."
            )
        return path

    @cached_property
    def vdvae_sha256(self) -> str:
        return file_digest(self.vdvae_checkpoint)

    @cached_property
    def clip_checkpoint(self) -> Path:
        """CLIP's weight file; FileNotFoundError says where to get it."""
        clip = self.config.clip
        if clip.checkpoint is None:
            return weights_path("clip") if clip.model == "mini" else published_checkpoint()
        path = Path(clip.checkpoint).expanduser().resolve()
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not there; --clip.checkpoint names CLIP's weight file")
        return path

    @cached_property
    def clip_sha256(self) -> str:
        return file_digest(self.clip_checkpoint)

    @cached_property
    def diffusion_folder(self) -> Path:
        """Versatile Diffusion's folder; FileNotFoundError says where to get it."""
        stage2 = self.config.stage2
        if stage2.folder is not None:
            path = Path(stage2.folder).expanduser().resolve()
        else:
            path = VERSATILE_DIFFUSION if stage2.model == "mini" else local_home(self.store) / "checkpoints" / PUBLISHED_DIFFUSION
        if not (path / "image_unet").is_dir():
            raise FileNotFoundError(
                f"{path} is not there. Stage 2 needs the folders image_unet, text_unet, vae and scheduler of "
                "shi-labs/versatile-diffusion (Hugging Face hub). Put them there, or say --stage2.folder FOLDER. "
                "Without them: --stage2.model none."
            )
        return path

    @cached_property
    def diffusion_sha256(self) -> str:
        """Of all weights and configurations that are read."""
        names = [f"{part}/config.json" for part in ("image_unet", "vae")] + ["scheduler/scheduler_config.json"]
        files = [self.diffusion_folder / name for name in names]
        files += [weights_file(self.diffusion_folder / part) for part in ("image_unet", "text_unet", "vae")]
        return hashlib.sha256("".join(file_digest(file) for file in files).encode()).hexdigest()

    @cached_property
    def replicates(self) -> list[Plan]:
        """The same with the other seeds."""
        own = self.config.evaluation
        evaluation = dataclasses.replace(own, seeds=(), controls=False)
        return [Plan(dataclasses.replace(self.config, seed=seed, evaluation=evaluation)) for seed in own.seeds]

    @property
    def is_referee(self) -> bool:
        """Whether reconstructions made elsewhere are scored."""
        return self.config.evaluation.images is not None

    @property
    def has_ceiling(self) -> bool:
        """Whether there are pictures from true latents and tokens."""
        return self.config.evaluation.ceiling and not self.is_referee

    @property
    def has_stage2(self) -> bool:
        return self.config.stage2.model != "none"

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of targets that this configuration needs."""
        context = self.config.stage2.context if self.has_stage2 else None
        needed = {"vdvae": True, "clip_vision": context in ("both", "vision"), "clip_text": context in ("both", "text")}
        return tuple(kind for kind in KINDS if needed[kind])

    @property
    def fits(self) -> list[Fit]:
        """All regressions, for each subject: the models to the VDVAE's latents, the token model to CLIP's tokens."""
        tokens = [Fit(self.config.token_model, kind) for kind in self.kinds[1:]]
        return [Fit(model, "vdvae") for model in self.config.models] + tokens

    @property
    def models(self) -> tuple[str, ...]:
        """What is compared."""
        return (IMAGES,) if self.is_referee else self.config.models

    @property
    def sources(self) -> tuple[str, ...]:
        """What gives pictures: the models, then the controls."""
        if self.is_referee or not self.config.evaluation.controls:
            return self.models
        possible = {"mean": True, "nearest": "clip_vision" in self.kinds, "vae": self.has_stage2}
        return (*self.models, *(control for control in CONTROLS if possible[control]))

    def columns(self, kind: str) -> list[str]:
        """Target columns that are predicted."""
        if kind == "vdvae":
            return [layer_name(i) for i in range(self.config.n_layers)]
        clip = CLIP_CONFIGS[self.config.clip.model]()
        return token_names(clip.n_vision_tokens if kind == "clip_vision" else clip.n_text_tokens)

    def shapes(self, kind: str) -> list[tuple[int, ...]]:
        """Shape of a cell in each of these columns."""
        if kind == "vdvae":
            return list(VDVAE_CONFIGS[self.config.targets.vdvae]().layer_shapes[: self.config.n_layers])
        return [(CLIP_CONFIGS[self.config.clip.model]().embed_dim,)] * len(self.columns(kind))

    @cached_property
    def betas(self) -> Stage:
        data = self.config.data
        design = {"expdesign_bytes": file_size(self.layout.expdesign)}
        return self._stage("betas", rois=sorted(data.rois), beta_version=data.beta_version, **design)

    @cached_property
    def samples(self) -> Stage:
        """Betas averaged over repeats, a row per image."""
        data = self.config.data
        return self._stage("samples", betas=self.betas.hash, protocol=data.protocol, rows_per_part=data.rows_per_part)

    def targets(self, kind: str = "vdvae") -> Stage:
        """Regression targets, rows as in the samples."""
        rows, config = self.config.data.rows_per_part, self.config
        if kind == "vdvae":
            settings = without(config.targets, "checkpoint", "batch_size")
            return self._stage("targets/vdvae", rows_per_part=rows, sha256=self.vdvae_sha256, **settings)
        settings = without(config.clip, "checkpoint", "batch_size")
        return self._stage(f"targets/{kind}", rows_per_part=rows, sha256=self.clip_sha256, **settings)

    def model(self, fit: Fit) -> Stage:
        """Fitted models of one regressor, ready to decode."""
        config = self.config
        settings: dict[str, Any] = config.settings(fit.regressor) | {"seed": config.seed, "columns": len(self.columns(fit.kind))}
        if fit.regressor == "ridge":
            alphas = {"vdvae": "alpha", "clip_vision": "alpha_vision", "clip_text": "alpha_text"}
            weights = settings["weights"] == "all" or settings["weights"] == fit.kind
            settings = {k: v for k, v in settings.items() if k not in alphas.values()}
            settings |= {"alphas": list(config.ridge.alphas) or [getattr(config.ridge, alphas[fit.kind])], "weights": weights}
        else:
            settings["n_train_workers"] = config.cluster.n_train_workers  # batch statistics and dropout are per worker
            del settings["checkpoint_every"]
            if (pretrained := self.pretrained(fit)) is None:
                del settings["pretrained"], settings["trunk_rate"]
            else:
                settings["pretrained"] = file_digest(pretrained / "network.safetensors")
            if fit.is_shared:  # each subject's decoder depends on all subjects' data
                settings["subjects"] = {subject.folder: digest(subject.inputs) for subject in self.subjects}
        targets = self.targets(fit.kind).hash
        return self._stage(f"models/{self.label(fit)}", settings=settings, samples=self.samples.hash, targets=targets)

    def pretrained(self, fit: Fit) -> Path | None:
        """Folder of the decoder to fine-tune, None for none (as for all tokens); FileNotFoundError if it holds no network."""
        folder = getattr(self.config, fit.network).pretrained
        if folder is None or fit.kind != "vdvae":
            return None
        path = Path(folder).expanduser().resolve()
        if not (path / "network.safetensors").is_file():
            raise FileNotFoundError(
                f"{path} holds no network.safetensors; --{fit.network}.pretrained names a finished folder "
                "models/<model>/subject=NN of a network"
            )
        return path

    def label(self, fit: Fit) -> str:
        """"ridge-15" for 15 VDVAE layers, "ridge-clip_text" for tokens."""
        return f"{fit.regressor}-{self.config.n_layers if fit.kind == 'vdvae' else fit.kind}"

    def predictions(self, fit: Fit) -> Stage:
        """Predicted targets of the test images."""
        if fit.regressor == "mean":
            return self._stage(f"predictions/{self.label(fit)}", samples=self.samples.hash, targets=self.targets(fit.kind).hash)
        return self._stage(f"predictions/{self.label(fit)}", model=self.model(fit).hash)

    def stage1(self, model: str | None) -> Stage:
        """Stage-1 pictures of the test images, from a model's latents; None: from the true ones, the ceiling of stage 1."""
        assert model not in STAGE2_ONLY, f"{model} has no stage 1"
        source = self.predictions(Fit(model, "vdvae")).hash if model else self.targets().hash
        settings = dataclasses.asdict(self.config.stage1) | {"n_layers": self.config.n_layers}
        return self._stage(f"reconstructions/stage1-{self._source(model)}", source=source, **settings)

    def stage2(self, model: str | None) -> Stage:
        """Stage-2 pictures of the test images, from a model's stage-1 pictures and the tokens that the token model predicts;
        None: from true latents and true tokens, the ceiling of stage 2."""
        if model == "nearest":
            tokens, truth = self.predictions(self.token_fit(model, "clip_vision")).hash, self.targets("clip_vision").hash
            return self._stage("reconstructions/stage2-nearest", tokens=tokens, targets=truth)
        if model == "vae":
            stage2 = self.config.stage2
            return self._stage("reconstructions/stage2-vae", sha256=self.diffusion_sha256, seed=stage2.seed, dtype=stage2.dtype)
        settings = without(self.config.stage2, "folder", "batch_size") | {"sha256": self.diffusion_sha256}
        if self.config.stage2.start == "stage1":
            settings["stage1"] = self.stage1(model).hash
        for kind in self.kinds[1:]:
            settings[kind] = (self.predictions(self.token_fit(model, kind)) if model else self.targets(kind)).hash
        return self._stage(f"reconstructions/stage2-{self._source(model)}", **settings)

    def images(self, model: str | None) -> Stage:
        """Pictures made elsewhere."""
        assert model == IMAGES
        evaluation = self.config.evaluation
        return self._stage(f"reconstructions/{IMAGES}", source=evaluation.images, order=evaluation.order)

    def token_fit(self, model: str, kind: str) -> Fit:
        """What predicts the tokens beside a model's latents: the token model, whatever the model, but for the control."""
        return Fit("mean" if model == "mean" else self.config.token_model, kind)

    def _source(self, model: str | None) -> str:
        if model == IMAGES:
            return IMAGES
        return f"{model}-{self.config.n_layers}" if model else "truth"

    @property
    def picture_stages(self) -> list[str]:
        """Methods of this class that give a stage of pictures."""
        if self.is_referee:
            return [IMAGES]
        return ["stage1", "stage2"] if self.has_stage2 else ["stage1"]

    def pictures_of(self, model: str | None) -> dict[str, Stage]:
        """All stages of pictures that a model (or a control) has, by name; None: those from the truth."""
        names = ["stage2"] if model in STAGE2_ONLY else self.picture_stages
        if model is None and not self.has_ceiling:
            return {}
        return {name: getattr(self, name)(model) for name in names}

    @property
    def suite_metrics(self) -> list[Metric]:
        """Metrics of pictures, in the order of their suites."""
        return [metric for suite in self.config.evaluation.suites for metric in find_suite(suite)]

    def backbone_file(self, name: str) -> Path:
        """Weight file of a metric's network; FileNotFoundError says where to get it."""
        if name == "clip_mini":
            return weights_path("clip")
        weights = self.config.evaluation.weights
        folder = Path(weights).expanduser().resolve() if weights else None
        named = folder is not None and (folder / BACKBONES[name].file).is_file()
        if name == "clip_vit_l14" and self.config.clip.model == "ViT-L-14" and not named:
            return self.clip_checkpoint  # the one that the tokens come from
        return backbone_weights(name, folder)

    @cached_property
    def backbone_files(self) -> dict[str, Path]:
        """Weight files of all networks that the suites need; those that are missing are left out if so configured."""
        found = {}
        for name in dict.fromkeys(metric.backbone for metric in self.suite_metrics if metric.backbone):
            try:
                found[name] = self.backbone_file(name)
            except FileNotFoundError as error:
                if not self.config.evaluation.skip_missing:
                    raise FileNotFoundError(f"{error} Without it: --evaluation.skip-missing, or another suite.") from error
        return found

    @cached_property
    def backbones_sha256(self) -> dict[str, str]:
        return {name: file_digest(path) for name, path in self.backbone_files.items()}

    def features(self, pictures: Stage | None) -> Stage:
        """What the suites' networks make of a stage of pictures; None: of the stimuli."""
        name, source = (pictures.name.removeprefix("reconstructions/"), pictures.hash) if pictures else ("seen", "stimuli")
        suites = sorted(self.config.evaluation.suites)
        return self._stage(f"features/{name}", pictures=source, suites=suites, sha256=self.backbones_sha256)

    def metrics(self, model: str) -> Stage:
        """Scores of the test images."""
        stages = [stage for source in (model, None) for stage in self.pictures_of(source).values()]
        features = [self.features(stage).hash for stage in stages]
        settings = {"features": features, "n_pool": N_POOL, "pixels": "from the size that they were made in"}
        return self._stage(f"metrics/{self._source(model)}", **settings)

    def tracked(self, name: str) -> Stage:
        """What has been written to MLflow."""
        return self._stage(f"runs/{self._source(name)}", metrics=self.metrics(name).hash)

    @cached_property
    def report(self) -> Stage:
        """Table, picture grids and page of all models."""
        settings = without(self.config.evaluation, "weights") | {"metrics": [self.metrics(name).hash for name in self.sources]}
        return self._stage(f"reports/{IMAGES if self.is_referee else self.config.recipe}", **settings)

    @property
    def report_partition(self) -> str:
        """The report of just these subjects."""
        return "subjects=" + "-".join(str(subject) for subject in self.config.data.subjects)

    @property
    def report_wanted(self) -> dict[str, Inputs]:
        """Files of the report."""
        inputs = {"subjects": digest([subject.inputs for subject in self.subjects])}
        names = ["table.txt", "report.html", *(f"subject{subject.subject:02d}.png" for subject in self.subjects)]
        return {name: inputs for name in names}

    def _stage(self, name: str, **config: Any) -> Stage:
        simulated = self.layout.root.name if self.is_simulated else False  # the name tells the simulation's settings
        return self.store.stage(name, config | {"stage": name, "simulated": simulated})


@dataclass(frozen=True)
class Part:
    """One shard of samples, and of everything that has a row per image."""

    name: str
    image_ids: np.ndarray

    @staticmethod
    def split(image_ids: np.ndarray, rows: int) -> list[Part]:
        return [Part(f"part-{i // rows:04d}.parquet", image_ids[i : i + rows]) for i in range(0, len(image_ids), rows)]


class SubjectPlan:
    """One subject's share of a plan: its sessions, voxels, images, and the inputs of its shards."""

    def __init__(self, plan: Plan, subject: int):
        self.plan, self.subject = plan, subject
        self.folder = subject_folder(subject)

    @cached_property
    def sessions(self) -> dict[int, Path]:
        """Session files of the protocol."""
        layout, protocol = self.plan.layout, self.plan.config.data.protocol
        numbers = protocol_sessions(layout, self.subject, protocol)
        return {number: layout.session_betas(self.subject, number) for number in numbers}

    @cached_property
    def voxels(self) -> Voxels:
        return load_voxels(self.plan.layout, self.subject, self.plan.config.data.rois)

    @cached_property
    def trials(self) -> Trials:
        """All trials of the protocol's sessions."""
        layout = self.plan.layout
        if self.plan.is_referee and not layout.betas_path(self.subject).is_dir():
            return planned_trials(layout, self.subject, self.plan.config.data.protocol)
        counts = {number: session_shape(path)[0] for number, path in self.sessions.items()}
        return trials(layout, self.subject, list(self.sessions), counts)

    def image_ids(self, split: str) -> np.ndarray:
        """Images of a split, "train" or "test", in the order of their first appearance; int32 (n_images,)."""
        ids = self.trials.image_id[self.trials.is_test == (split == "test")]
        _, first = np.unique(ids, return_index=True)
        return ids[np.sort(first)]

    def parts(self, split: str) -> list[Part]:
        return Part.split(self.image_ids(split), self.plan.config.data.rows_per_part)

    # What each shard is made from, stage by stage.

    @cached_property
    def betas_wanted(self) -> dict[str, Inputs]:
        voxels = hashlib.sha256(self.voxels.index.tobytes()).hexdigest()[:10]
        wanted: dict[str, Inputs] = {"voxels.parquet": {"voxels": voxels}}
        for number, path in self.sessions.items():
            wanted[f"session={number:02d}.parquet"] = {"voxels": voxels, path.name: path.stat().st_size}
        return wanted

    @cached_property
    def inputs(self) -> Inputs:
        """What everything from the samples on is made from: the subject's betas and the stimuli; or the pictures that others
        made, and the stimuli."""
        if self.plan.is_referee:
            return {"images": self.foreign.digest, "stimuli_bytes": file_size(self.plan.layout.stimuli)}
        return {"betas": digest(self.betas_wanted), "stimuli_bytes": file_size(self.plan.layout.stimuli)}

    def wanted(self, split: str = "test") -> dict[str, Inputs]:
        """Shards with a row per image of a split."""
        return {part.name: self.inputs for part in self.parts(split)}

    def samples(self, split: str) -> str:
        """Partition of the samples."""
        return f"{self.folder}/{split}"

    def targets(self, split: str) -> str:
        """Partition of the targets: a subject's own training images, or all shared images, once for everybody."""
        return self.samples("train") if split == "train" else "shared"

    def target_parts(self, split: str) -> list[Part]:
        """Shards of the targets: those of the training samples, or the shared images in the design's order."""
        if split == "train":
            return self.parts("train")
        return Part.split(self.plan.shared_images, self.plan.config.data.rows_per_part)

    def targets_wanted(self, split: str, kind: str = "vdvae") -> dict[str, Inputs]:
        """Shards of the targets: of what the pictures (or the captions) are, and of which."""
        source = self._captions if kind == "clip_text" else {"stimuli_bytes": self.inputs["stimuli_bytes"]}
        return {part.name: source | {"images": digest(part.image_ids.tolist())} for part in self.target_parts(split)}

    @cached_property
    def _captions(self) -> Inputs:
        layout = self.plan.layout
        files = {split: layout.captions(split) for split in CAPTION_SPLITS}
        sizes = {f"captions_{split}_bytes": path.stat().st_size for split, path in files.items() if path.is_file()}
        return {"stim_info_bytes": file_size(layout.stim_info)} | sizes

    @cached_property
    def foreign(self) -> ForeignPictures:
        """The reconstructions made elsewhere."""
        evaluation = self.plan.config.evaluation
        path = Path(evaluation.images.format(subject=self.subject)).expanduser().resolve()
        return find_pictures(path, self.image_ids("test"), evaluation.order)

    def pictures(self, model: str | None) -> tuple[str, dict[str, Inputs]]:
        """Partition and shards of a model's pictures; model None: of those from the truth, shared by all who saw the same.

        Shards are small, so that many replicas have work to do.
        """
        ids = self.image_ids("test")
        source = self.inputs if model else {"stimuli_bytes": self.inputs["stimuli_bytes"]} | self._truth
        wanted = {part.name: source for part in Part.split(ids, ROWS_PER_PICTURES)}
        return (self.folder if model else f"test-{digest(ids.tolist())}"), wanted

    @property
    def _truth(self) -> Inputs:
        captions = self._captions if "clip_text" in self.plan.kinds and not self.plan.is_referee else {}
        return captions | {"images": digest(self.image_ids("test").tolist())}

    def run_key(self, model: str) -> str:
        """What MLflow's run of this subject and model is found by."""
        return f"{self.plan.metrics(model).folder}/{self.folder}/{digest(self.inputs)}"
