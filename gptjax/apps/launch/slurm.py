"""A batch job of Slurm."""

import shlex
from typing import NamedTuple

from gptjax.apps.launch.clusters import XLA_FLAGS
from gptjax.errors import UserError


class SlurmJob(NamedTuple):
    """What sbatch is to be asked for.

    Attributes:
        name: of the job.
        command: of one task.
        log: the file that all output is appended to; %j is the job's number.
        nodes: how many.
        tasks_per_node: processes on each.
        gpus_per_node: 0 for a cluster of CPUs.
        grace_s: seconds before the time limit at which the tasks are told to save.
        options: further ones of sbatch, such as --partition=NAME.
        setup: lines of shell before the tasks start.
        variables: of the tasks' environment.
    """

    name: str
    command: list[str]
    log: str
    nodes: int
    tasks_per_node: int
    gpus_per_node: int
    grace_s: int
    options: list[str]
    setup: str | None
    variables: dict[str, str]


SCRIPT = """\
#!/bin/bash
# Written by `gptjax launch slurm`. The tasks find each other through JAX, which asks Slurm who they are.
{options}

{setup}
# Node names need not resolve, so JAX is told the address under which Slurm itself knows the first node. The port lies
# above the ephemeral ones.
first=$(timeout 60 scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(timeout 60 scontrol show node "$first" | sed -n 's/.*NodeAddr=\\([^ ]*\\).*/\\1/p')
if [ -z "$address" ]; then
  echo "scontrol does not tell the address of the first node of $SLURM_JOB_NODELIST" >&2
  exit 1
fi
case "$address" in *:*) address="[$address]" ;; esac # IPv6
export JAX_COORDINATOR_ADDRESS="$address:$((61440 + SLURM_JOB_ID % 4096))"

# A task that fails ends the others itself, with a log that says why; Slurm's own, sudden way is the second line.
srun --kill-on-bad-exit=0 --wait=300 {command}
code=$?
if [ "$code" -eq 75 ]; then # stopped by a signal, all is saved
  echo "requeueing: attempt $((${{SLURM_RESTART_COUNT:-0}} + 1)) ended with everything saved"
  timeout 60 scontrol requeue "$SLURM_JOB_ID" || echo "scontrol requeue failed: submit the job again to resume" >&2
fi
exit "$code"
"""


def batch_script(job: SlurmJob) -> str:
    """Return the script that sbatch takes.

    Raises:
        UserError: a path or option with a line break, which no #SBATCH line can hold.
    """
    options = [f"--job-name={job.name}", f"--nodes={job.nodes}", f"--ntasks-per-node={job.tasks_per_node}"]
    if job.gpus_per_node:
        options.append(f"--gpus-per-node={job.gpus_per_node}")
    # Without B: the signal goes to the tasks alone; this script lives on to see their exit code.
    options += [
        f"--signal=TERM@{job.grace_s}",
        "--requeue",
        "--open-mode=append",
        f"--output={job.log}",
    ]
    if broken := [option for option in (*options, *job.options) if "\n" in option]:
        raise UserError(f"{broken[0]!r} has a line break, which no #SBATCH line can hold; give another")
    variable, flags = XLA_FLAGS["cuda" if job.gpus_per_node else "cpu"]
    setup = [job.setup] if job.setup else []
    setup += [f"export {name}={shlex.quote(value)}" for name, value in job.variables.items()]
    setup += [f'export {variable}="{" ".join(flags)} ${variable}"'] if flags else []
    return SCRIPT.format(
        options="\n".join(f"#SBATCH {line}" for line in [*map(_quoted, options), shlex.join(job.options)] if line),
        setup="".join(f"{line}\n" for line in setup),
        command=shlex.join(job.command),
    )


def _quoted(option: str) -> str:
    """An option with its value in quotes where it needs them; sbatch reads them as a shell does."""
    name, _, value = option.partition("=")
    return f"{name}={shlex.quote(value)}" if value else name
