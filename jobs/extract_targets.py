"""Stimuli to VDVAE latents and CLIP tokens, captions to CLIP tokens: the regression targets, one column per layer or token.

    python jobs/extract_targets.py
    python jobs/extract_targets.py ridge-31 --data.nsd-root /data/nsd --targets.checkpoint imagenet64-iter-1600000-model-ema.th
"""
from __future__ import annotations

from cli import main, plan_from_command_line

from nsdray.cluster.preflight import checked, require_inputs
from nsdray.cluster.run import anything_missing, extract_targets, targets_partitions

NEEDS = ("betas", "stimuli", "captions", "checkpoints")


def run() -> None:
    plan = plan_from_command_line(__doc__)
    require_inputs(plan, NEEDS)
    if any(anything_missing(targets_partitions(plan, kind)) for kind in plan.kinds):
        with checked(plan, NEEDS, tracked=False):
            extract_targets(plan)
    else:
        print("Everything is up to date.")
    print(f"VDVAE: {plan.vdvae_checkpoint} (SHA-256 {plan.vdvae_sha256})")
    if plan.has_stage2:
        print(f"CLIP:  {plan.clip_checkpoint} (SHA-256 {plan.clip_sha256})")
    for kind in plan.kinds:
        print(f"{kind} targets: {plan.targets(kind).uri()}")


if __name__ == "__main__":
    main(run)
