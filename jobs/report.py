"""Write the report of a finished run anew, with what was finished since (such as its noise sensitivity); log it to MLflow.

    python jobs/report.py
    python jobs/report.py gru-15 --data.nsd-root /data/nsd

One HTML file with everything in it: tables with error bars, published figures, noise and learning curves, pictures, provenance.
"""
from __future__ import annotations

from cli import main, plan_from_command_line

from nsdray.cluster.results import report_again, untracked


def run() -> None:
    plan = plan_from_command_line(__doc__)
    if untracked(plan) or plan.report.missing(plan.report_partition, plan.report_wanted):
        job = "evaluate.py" if plan.is_referee else "train_all_subjects.py"
        raise ValueError(f"this run is not finished; python jobs/{job} {plan.config.recipe} … finishes it")
    report_again(plan)
    print(f"report: {plan.report.uri(plan.report_partition)}/report.html")


if __name__ == "__main__":
    main(run)
