"""Write a batch job for Slurm."""

import shlex
from typing import NamedTuple

from gptjax.apps.launch.clusters import XLA_FLAGS
from gptjax.errors import UserError


class SlurmJob(NamedTuple):
    """A job for Slurm.

    Attributes:
        name: name of the job.
        command: command of one task.
        log: file to which all output is appended; %j is the job's number.
        nodes: number of nodes.
        tasks_per_node: processes on each node.
        gpus_per_node: number of GPUs on each node; 0 for a cluster of CPUs.
        grace_s: seconds before the time limit at which the tasks are told to save.
        options: further options of sbatch, such as --partition=NAME.
        setup: shell commands that run before the tasks start.
        variables: environment variables of the tasks.
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
# Written by `gptjax launch slurm`. JAX reads the number of processes and their ranks from Slurm.
{options}

{setup}
# Node names need not resolve, so JAX gets the address under which Slurm knows the first node. The port is above the
# ephemeral ones.
first=$(timeout 60 scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(timeout 60 scontrol show node "$first" | sed -n 's/.*NodeAddr=\\([^ ]*\\).*/\\1/p')
if [ -z "$address" ]; then
  echo "scontrol does not report the address of the first node of $SLURM_JOB_NODELIST" >&2
  exit 1
fi
case "$address" in *:*) address="[$address]" ;; esac # IPv6
export JAX_COORDINATOR_ADDRESS="$address:$((61440 + SLURM_JOB_ID % 4096))"

# A task that fails ends the others by itself and logs the reason; srun kills them only if that takes over 300 s.
srun --kill-on-bad-exit=0 --wait=300 {command}
code=$?
if [ "$code" -eq 75 ]; then # stopped by a signal, with everything saved
  echo "requeueing: attempt $((${{SLURM_RESTART_COUNT:-0}} + 1)) ended with everything saved"
  timeout 60 scontrol requeue "$SLURM_JOB_ID" || echo "scontrol requeue failed: submit the job again to resume" >&2
fi
exit "$code"
"""


def batch_script(job: SlurmJob) -> str:
    """Return the script for sbatch.

    Raises:
        UserError: a path or option with a line break, which an #SBATCH line cannot contain.
    """
    options = [f"--job-name={job.name}", f"--nodes={job.nodes}", f"--ntasks-per-node={job.tasks_per_node}"]
    if job.gpus_per_node:
        options.append(f"--gpus-per-node={job.gpus_per_node}")
    # Without "B:" the signal goes to the tasks only; this script keeps running and reads their exit code.
    options += [
        f"--signal=TERM@{job.grace_s}",
        "--requeue",
        "--open-mode=append",
        f"--output={job.log}",
    ]
    if broken := [option for option in (*options, *job.options) if "\n" in option]:
        raise UserError(f"{broken[0]!r} has a line break, which an #SBATCH line cannot contain; remove it")
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
    """Return an option with its value quoted if necessary; sbatch parses it as a shell does."""
    name, _, value = option.partition("=")
    return f"{name}={shlex.quote(value)}" if value else name
