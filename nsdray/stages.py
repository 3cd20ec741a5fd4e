"""Which stages a configuration has, what each is made from, and what is still missing. Reads headers only.

The folder of a stage is shared by all subjects; what is particular to a subject (its files, its voxels) is in the
inputs of its shards. So one more subject or session redoes nothing that it does not alter.
"""
from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from nsdray.config import Config, digest
from nsdray.mini import weights_path
from nsdray.models.vdvae import VDVAEConfig
from nsdray.nsd.betas import session_shape
from nsdray.nsd.design import Trials, protocol_sessions, trials
from nsdray.nsd.layout import NSDLayout
from nsdray.nsd.rois import Voxels, load_voxels
from nsdray.nsd.simulate import simulate_nsd
from nsdray.store import Inputs, Stage, Store, resolve_root, subject_folder

PUBLISHED_VDVAE = "imagenet64-iter-1600000-model-ema.th"
VDVAE_CONFIGS = {"mini": VDVAEConfig.mini, "imagenet64": VDVAEConfig.imagenet64}


def file_digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
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


class Plan:
    """All stages of a configuration, for all its subjects."""

    def __init__(self, config: Config):
        self.config = config
        self.store = Store(resolve_root(config.store.root))
        self.is_simulated = config.data.nsd_root is None
        root = self._simulated_root() if self.is_simulated else Path(config.data.nsd_root).expanduser().resolve()
        self.layout = NSDLayout(root, beta_version=config.data.beta_version)
        self.subjects = [SubjectPlan(self, subject) for subject in config.data.subjects]

    def _local_home(self) -> Path:
        """A local folder for what cannot lie in an object store."""
        return Path(self.store.base if self.store.is_local else "~/nsdray-data").expanduser()

    def _simulated_root(self) -> Path:
        settings = dataclasses.asdict(self.config.simulation)
        folder = self._local_home() / f"miniature-nsd-{digest(settings)}"
        simulate_nsd(folder, subjects=self.config.data.subjects, **settings)
        return folder

    @cached_property
    def vdvae_checkpoint(self) -> Path:
        """The VDVAE's weight file; FileNotFoundError says where to get it."""
        targets = self.config.targets
        if targets.checkpoint is not None:
            path = Path(targets.checkpoint).expanduser().resolve()
        elif targets.vdvae == "mini":
            path = weights_path("vdvae")
        else:
            path = self._local_home() / "checkpoints" / PUBLISHED_VDVAE
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
    def betas(self) -> Stage:
        data = self.config.data
        design = {"expdesign_bytes": file_size(self.layout.expdesign)}
        return self._stage("betas", rois=sorted(data.rois), beta_version=data.beta_version, **design)

    @cached_property
    def samples(self) -> Stage:
        """Betas averaged over repeats, a row per image."""
        data = self.config.data
        return self._stage("samples", betas=self.betas.hash, protocol=data.protocol, rows_per_part=data.rows_per_part)

    @cached_property
    def targets(self) -> Stage:
        """VDVAE latents, rows as in the samples."""
        settings = {k: v for k, v in dataclasses.asdict(self.config.targets).items() if k not in ("checkpoint", "batch_size")}
        return self._stage(
            "targets/vdvae", rows_per_part=self.config.data.rows_per_part, sha256=self.vdvae_sha256, **settings
        )

    @cached_property
    def truth(self) -> Stage:
        """Pictures from the true latents: the ceiling of stage 1."""
        return self._stage("reconstructions/true-latents", targets=self.targets.hash, **self._stage1_settings())

    def model(self, name: str) -> Stage:
        """Fitted models of one regressor, ready to decode."""
        config = self.config
        settings: dict[str, Any] = config.settings(name) | {"n_layers": config.n_layers, "seed": config.seed}
        if name != "ridge":
            settings["n_train_workers"] = config.cluster.n_train_workers  # batch statistics and dropout are per worker
            del settings["checkpoint_every"]
        return self._model_stage("models", name, settings=settings, samples=self.samples.hash, targets=self.targets.hash)

    def predictions(self, name: str) -> Stage:
        """Predicted latents of the test images."""
        return self._model_stage("predictions", name, model=self.model(name).hash)

    def reconstructions(self, name: str) -> Stage:
        """Decoded pictures of the test images."""
        return self._model_stage(
            "reconstructions", name, predictions=self.predictions(name).hash, **self._stage1_settings()
        )

    def metrics(self, name: str) -> Stage:
        """Scores of the test images."""
        return self._model_stage(
            "metrics", name, truth=self.truth.hash, reconstructions=self.reconstructions(name).hash
        )

    def tracked(self, name: str) -> Stage:
        """What has been written to MLflow."""
        return self._model_stage("runs", name, metrics=self.metrics(name).hash)

    @cached_property
    def report(self) -> Stage:
        """Table and picture grids of all models."""
        return self._stage(f"reports/{self.config.recipe}", metrics=[self.metrics(name).hash for name in self.config.models])

    @property
    def report_partition(self) -> str:
        """The report of just these subjects."""
        return "subjects=" + "-".join(str(subject) for subject in self.config.data.subjects)

    @property
    def report_wanted(self) -> dict[str, Inputs]:
        """Files of the report."""
        inputs = {"subjects": digest([subject.inputs for subject in self.subjects])}
        return {"table.txt": inputs} | {f"subject{subject.subject:02d}.png": inputs for subject in self.subjects}

    def _stage1_settings(self) -> dict[str, Any]:
        return dataclasses.asdict(self.config.stage1) | {"n_layers": self.config.n_layers}

    def _model_stage(self, kind: str, regressor: str, **config: Any) -> Stage:
        return self._stage(f"{kind}/{regressor}-{self.config.n_layers}", **config)

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
        counts = {number: session_shape(path)[0] for number, path in self.sessions.items()}
        return trials(self.plan.layout, self.subject, list(self.sessions), counts)

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
        """What everything from the samples on is made from: the subject's betas and the stimuli."""
        return {"betas": digest(self.betas_wanted), "stimuli_bytes": file_size(self.plan.layout.stimuli)}

    def wanted(self, split: str = "test") -> dict[str, Inputs]:
        """Shards with a row per image of a split."""
        return {part.name: self.inputs for part in self.parts(split)}

    def samples(self, split: str) -> str:
        """Partition of the samples."""
        return f"{self.folder}/{split}"

    def targets(self, split: str) -> str:
        """Partition of the targets: a subject's own training images; test images once for all who saw the same."""
        return self.samples("train") if split == "train" else f"test-{digest(self.image_ids('test').tolist())}"

    def targets_wanted(self, split: str) -> dict[str, Inputs]:
        """Shards of the targets."""
        stimuli = {"stimuli_bytes": self.inputs["stimuli_bytes"]}
        return {part.name: stimuli | {"images": digest(part.image_ids.tolist())} for part in self.parts(split)}

    def run_key(self, model: str) -> str:
        """What MLflow's run of this subject and model is found by."""
        return f"{self.plan.metrics(model).folder}/{self.folder}/{digest(self.inputs)}"
