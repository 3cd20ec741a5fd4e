"""NSD's session files to betas and samples (mean over repeats), as Parquet.

    python jobs/prepare_betas.py
    python jobs/prepare_betas.py ridge-15 --data.nsd-root /data/nsd --data.subjects 1 2 5 7 --data.rois nsdgeneral
"""
from __future__ import annotations

from cli import main, plan_from_command_line

from nsdray.cluster.preflight import checked, require_inputs
from nsdray.cluster.run import anything_missing, betas_partitions, prepare_betas, samples_partitions

NEEDS = ("betas", "stimuli")


def run() -> None:
    plan = plan_from_command_line(__doc__)
    require_inputs(plan, NEEDS)
    if anything_missing(betas_partitions(plan) + samples_partitions(plan)):
        with checked(plan, NEEDS, tracked=False):
            prepare_betas(plan)
    else:
        print("Everything is up to date.")
    for subject in plan.subjects:
        n_train, n_test = (len(subject.image_ids(split)) for split in ("train", "test"))
        print(f"subject {subject.subject}: {len(subject.voxels.index)} voxels, {len(subject.sessions)} sessions, "
              f"{n_train} training and {n_test} test images")  # fmt: skip
    print(f"betas:   {plan.betas.uri()}\nsamples: {plan.samples.uri()}")


if __name__ == "__main__":
    main(run)
