"""Emit a study's rungs for a batch system: as a Slurm job array, or as an indexed Job of Kubernetes (GKE).

Each task carries out one rung by `gptjax scaling run DIR --rung ID`; a task that is stopped with everything saved
(exit code 75) is queued again, and a finished rung costs a second task nothing.
"""

import os
import shlex

import yaml

from gptjax.apps.scaling.study import load_study
from gptjax.errors import STOPPED

AT_ONCE = 16  # tasks; an array of hundreds should not fill a queue at once


def slurm(study: str, ids: list[str]) -> str:
    """Return a script for sbatch. Time, partition and devices depend on the cluster: give them to sbatch."""
    return f"""#!/bin/bash
#SBATCH --job-name=scaling
#SBATCH --array=0-{len(ids) - 1}%{AT_ONCE}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@120
rungs=({" ".join(ids)})
gptjax scaling run {shlex.quote(study)} --rung "${{rungs[$SLURM_ARRAY_TASK_ID]}}" &
trap 'kill -TERM $!' TERM
wait $!; code=$?
if [ $code -gt 128 ]; then wait $!; code=$?; fi  # a signal ends the first wait, not the run
if [ $code -eq {STOPPED} ]; then scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID"; fi
exit $code
"""


def gke(study: str, ids: list[str]) -> str:
    """Return a Job for kubectl; the volume claim `scaling` contains the study and its base config at their paths
    here.

    Name your image.
    """
    base = os.path.dirname(os.path.abspath(load_study(study).base))
    home = os.path.commonpath([os.path.abspath(study), base])
    run = f'exec gptjax scaling run {shlex.quote(os.path.abspath(study))} --rung "$1"'
    # Each rung is a run of its own; with its number in the environment it would look for the others as its peers.
    command = f'set -- {" ".join(ids)}; shift "$JOB_COMPLETION_INDEX"; unset JOB_COMPLETION_INDEX; {run}'
    container = {
        "name": "rung",
        "image": "gptjax",
        "command": ["/bin/sh", "-c", command.replace("$(", "$$(")],  # Kubernetes replaces $(NAME)
        "volumeMounts": [{"name": "study", "mountPath": home}],
    }
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "scaling"},
        "spec": {
            "completionMode": "Indexed",
            "completions": len(ids),
            "parallelism": min(AT_ONCE, len(ids)),
            "backoffLimitPerIndex": 3,
            "podFailurePolicy": {  # neither a run that saved and stopped nor a lost node is a failure
                "rules": [
                    {"action": "Ignore", "onExitCodes": {"operator": "In", "values": [STOPPED]}},
                    {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]},
                ]
            },
            "template": {
                "spec": {
                    "restartPolicy": "Never",
                    "containers": [container],
                    "volumes": [{"name": "study", "persistentVolumeClaim": {"claimName": "scaling"}}],
                }
            },
        },
    }
    return yaml.safe_dump(job, sort_keys=False)


EMITTERS = {"slurm": slurm, "gke": gke}
