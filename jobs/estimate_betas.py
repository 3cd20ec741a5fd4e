"""BOLD to single-trial betas (GLMsingle's method), as session files in NSD's layout that prepare_betas.py reads.

    python jobs/estimate_betas.py                                         # miniature NSD with BOLD (SIMULATED)
    python jobs/estimate_betas.py --nsd-root /data/nsd --subjects 1 2     # NSD's time series; betas beside NSD's own
    python jobs/estimate_betas.py --bids.root /data/bids --bids.bold /data/bids/derivatives/fmriprep --bids.space T1w \\
        --bids.mask /data/masks/sub-{participant}.nii.gz --bids.n-test-images 50 --output /data/mylab

What to type next, to decode from these betas, is printed at the end. Finished sessions are skipped, an interrupted one
goes on.
"""
from __future__ import annotations

import dataclasses
import shlex

from cli import main

import tyro  # isort: skip  (cli sets Ray's and MLflow's environment first)

from nsdray.cluster.glm import GLMPlan, estimate_betas
from nsdray.config import DataConfig, GLMConfig, SimulationConfig
from nsdray.nsd.design import protocol_sessions


def run() -> None:
    plan = GLMPlan(tyro.cli(GLMConfig, description=__doc__))
    print(f"BOLD: {plan.source}" + (" (SIMULATED: it shows that the method works, nothing more)" if plan.is_simulated else ""))
    for label, subject in plan.labels.items():
        print(f"  sub-{label} is subject {subject}")
    estimate_betas(plan)
    layout, subjects = plan.layout, sorted(plan.sessions)
    print("betas: " + " ".join(str(layout.betas_path(subject)) for subject in subjects))
    print(not_yet(plan) or f"next: {shlex.join(next_command(plan))}")


def not_yet(plan: GLMPlan) -> str | None:
    """What is missing before these betas can be decoded, or None: decoding takes all sessions that a subject did."""
    try:
        for subject in plan.sessions:
            protocol_sessions(plan.layout, subject, DataConfig().protocol)
    except (FileNotFoundError, ValueError) as error:
        return f"not enough to decode from: {error}, or estimate them: this job without --sessions"
    return None


def next_command(plan: GLMPlan) -> list[str]:
    """The command that decodes from these betas."""
    config, default = plan.config, "betas_fithrf_GLMdenoise_RR"
    command = ["python", "jobs/train_all_subjects.py", "mini", "--data.subjects", *map(str, sorted(plan.sessions))]
    if plan.is_simulated:
        for name, value in dataclasses.asdict(config.simulation).items():
            if value != getattr(SimulationConfig(), name):
                option = f"--simulation.{name.replace('_', '-')}"
                command += [option] if value is True else [option, str(value)]
    else:
        command += ["--data.nsd-root", str(plan.layout.root)]
    if config.store.root is not None:
        command += ["--store.root", config.store.root]
    if plan.layout.beta_version != default:
        command += ["--data.beta-version", plan.layout.beta_version]
    if config.bids.root is not None and config.bids.captions is None:
        command += ["--stage2.context", "vision"]
    return command


if __name__ == "__main__":
    main(run)
