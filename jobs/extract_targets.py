"""Stimuli to VDVAE latents, the regression targets of stage 1, as Parquet with one column per layer.

    python jobs/extract_targets.py
    python jobs/extract_targets.py ridge-31 --data.nsd-root /data/nsd --targets.checkpoint imagenet64-iter-1600000-model-ema.th
"""
from __future__ import annotations

from cli import main, plan_from_command_line

from nsdray.cluster.run import anything_missing, extract_targets, start_ray, targets_partitions


def run() -> None:
    plan = plan_from_command_line(__doc__)
    if anything_missing(targets_partitions(plan)):
        start_ray(plan)
        extract_targets(plan)
    else:
        print("Everything is up to date.")
    print(f"VDVAE: {plan.vdvae_checkpoint} (SHA-256 {plan.vdvae_sha256})\ntargets: {plan.targets.uri()}")


if __name__ == "__main__":
    main(run)
