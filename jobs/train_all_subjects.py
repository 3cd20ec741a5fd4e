"""Decode all subjects, end to end: betas, targets, regressors, pictures of both stages, scores, MLflow.

    python jobs/train_all_subjects.py                                    # miniature NSD (SIMULATED), minutes on two cores
    python jobs/train_all_subjects.py gru-15 --data.nsd-root /data/nsd   # the paper, on NSD
    ray job submit --working-dir . -- python jobs/train_all_subjects.py  # the same on a running cluster

Whatever is missing is made, whatever is finished is skipped, whatever was interrupted goes on.
"""
from __future__ import annotations

from cli import main, plan_from_command_line

from nsdray.cluster.report import report_file
from nsdray.cluster.results import train_all_subjects
from nsdray.cluster.tracking import tracking_uri
from nsdray.store import redacted


def run() -> None:
    plan = plan_from_command_line(__doc__)
    train_all_subjects(plan)
    print(f"\n{report_file(plan, 'table.txt').decode()}")
    print("pictures (seen | stage 1 | stage 2 of each model | from the truth):")
    for subject in plan.subjects:
        print(f"  {plan.report.uri(plan.report_partition)}/subject{subject.subject:02d}.png")
    uri = redacted(tracking_uri(plan.store))
    shown = f"mlflow ui --backend-store-uri {uri}" if uri.startswith("sqlite") else uri
    print(f"MLflow: {shown}   (or, for the default root: make ui)")
    print(f"report: {plan.report.uri(plan.report_partition)}/report.html")


if __name__ == "__main__":
    main(run)
