"""Reconstruct the test set of every subject: stage 1 by the VDVAE, stage 2 by Versatile Diffusion, on as many replicas as fit.

    python jobs/reconstruct_test_set.py
    python jobs/reconstruct_test_set.py ridge-31 --data.nsd-root /data/nsd --stage2.folder /data/versatile-diffusion
    python jobs/reconstruct_test_set.py mini --stage2.sampler ddim --stage2.n-steps 50 --stage2.guidance 7.5
    python jobs/reconstruct_test_set.py mini --stage2.context text --stage2.start noise --stage2.strength 1

What comes before (betas, targets, regressors) is brought up to date first. Pictures are PNG in Parquet. It stops there and
needs no weights of metrics: scores, grids and MLflow runs are made by jobs/train_all_subjects.py with the same settings. Other
settings of stage 2 redo stage 2 only.
"""
from __future__ import annotations

from cli import main, plan_from_command_line

from nsdray.cluster.results import reconstruct_all_subjects


def run() -> None:
    plan = plan_from_command_line(__doc__)
    reconstruct_all_subjects(plan)
    for model in plan.config.models:
        for stage in plan.picture_stages:
            print(f"{model}, {stage}: {getattr(plan, stage)(model).uri()}")


if __name__ == "__main__":
    main(run)
