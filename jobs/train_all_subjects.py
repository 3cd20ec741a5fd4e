"""Decode all subjects, end to end: betas, targets, regressors, stage-1 pictures, scores, MLflow.

    python jobs/train_all_subjects.py                                    # miniature NSD (SIMULATED), minutes on two cores
    python jobs/train_all_subjects.py gru-15 --data.nsd-root /data/nsd   # the paper's first stage on NSD
    ray job submit --working-dir . -- python jobs/train_all_subjects.py  # the same on a running cluster

Whatever is missing is made, whatever is finished is skipped, whatever was interrupted goes on.
"""
from __future__ import annotations

from cli import main, plan_from_command_line

from nsdray.cluster.run import grids, score_rows, train_all_subjects
from nsdray.cluster.tracking import tracking_uri
from nsdray.metrics.table import format_table


def run() -> None:
    plan = plan_from_command_line(__doc__)
    train_all_subjects(plan)
    print(f"\nTest-set means, {'SIMULATED brain data' if plan.is_simulated else 'NSD'}, {plan.config.n_layers} VDVAE layers")
    print(format_table(score_rows(plan)))
    print("\npictures (seen | true latents | decoded):")
    for path in grids(plan):
        print(f"  {path}")
    print(f"MLflow: {tracking_uri(plan.store)} (open it with: make ui)")


if __name__ == "__main__":
    main(run)
