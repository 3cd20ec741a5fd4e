"""Score a run, or reconstructions that others made.

    python jobs/evaluate.py                                              # a run: what it lacks is made first
    python jobs/evaluate.py ridge-15 --data.nsd-root /data/nsd --images 'results/versatile_diffusion/subj{subject:02d}'
    python jobs/evaluate.py ridge-15 --data.nsd-root /data/nsd --images my_pictures --data.subjects 1 --evaluation.skip-missing
    python jobs/evaluate.py ridge-15 --data.nsd-root /data/nsd --images all_recons.pt --data.subjects 1 --data.protocol nsd40

--images (short for --evaluation.images) names a folder with one picture per test image, or a .pt or .npy file of all; --order
says how they are named or ordered (see --evaluation.order). Of NSD that needs the stimuli and the design file only; of the recipe
only the suites of metrics (--evaluation.suites) matter then. Scores come with error bars and chance level.
"""
from __future__ import annotations

import sys

from cli import main, plan_from_command_line

from nsdray.cluster.report import report_file
from nsdray.cluster.results import judge, train_all_subjects

SHORT = {"--images": "--evaluation.images", "--order": "--evaluation.order"}


def run() -> None:
    for i, argument in enumerate(sys.argv):
        name, equals, value = argument.partition("=")
        sys.argv[i] = SHORT.get(name, name) + equals + value
    plan = plan_from_command_line(__doc__)
    if plan.is_referee:
        for subject in plan.subjects:
            images = subject.foreign
            print(f"subject {subject.subject}: {len(images.places)} pictures of {images.path}, order: {images.order}")
        judge(plan)
    else:
        train_all_subjects(plan)
    print(f"\n{report_file(plan, 'table.txt').decode()}")
    print(f"report: {plan.report.uri(plan.report_partition)}/report.html")


if __name__ == "__main__":
    main(run)
