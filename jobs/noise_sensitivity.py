"""How much stage 2 owes to stage 1: noise added to the stage-1 picture, and stage 2 made anew (paper, 3.4 and table 6).

    python jobs/noise_sensitivity.py                                  # miniature NSD (SIMULATED)
    python jobs/noise_sensitivity.py gru-15 --data.nsd-root /data/nsd --data.subjects 1

Table, chart and the report with both; what comes before is brought up to date first, finished levels are skipped.
"""
from __future__ import annotations

from cli import main, plan_from_command_line

from nsdray.cluster.noise import noise_sensitivity


def run() -> None:
    plan = plan_from_command_line(__doc__)
    stage = noise_sensitivity(plan)
    folder = f"{stage.folder}/{plan.report_partition}"
    print(f"\n{plan.store.read_bytes(f'{folder}/table.txt').decode()}")
    print(f"report: {plan.store.uri(folder)}/report.html")


if __name__ == "__main__":
    main(run)
