"""How much stage 2 owes to stage 1: noise added to the stage-1 picture, and stage 2 made anew (paper, 3.4 and table 6).

    python jobs/noise_sensitivity.py                                  # miniature NSD (SIMULATED)
    python jobs/noise_sensitivity.py gru-15 --data.nsd-root /data/nsd --data.subjects 1

Table and chart go into the run's report; what comes before is brought up to date first, finished levels are skipped.
"""
from __future__ import annotations

from cli import main, plan_from_command_line

from nsdray.cluster.results import noise_sensitivity


def run() -> None:
    plan = plan_from_command_line(__doc__)
    print(f"\n{noise_sensitivity(plan)}")
    print(f"report: {plan.report.uri(plan.report_partition)}/report.html")


if __name__ == "__main__":
    main(run)
