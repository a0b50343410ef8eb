"""Write a script of gcloud commands for TPU slices of Google Cloud without Kubernetes."""

import shlex
from typing import NamedTuple

from gptjax.apps.launch.clusters import Slice
from gptjax.apps.launch.container import merge_xla_flags


class TpuVmJob(NamedTuple):
    """A job for TPU VMs.

    Attributes:
        name: name of the queued resource, and of its slices.
        image: container image, built from the repository's Dockerfile with the extra tpu; the VMs' Python is too old.
        slice: the TPU slice.
        num_slices: number of slices, joined by the data-centre network.
        zone: zone of Google Cloud, such as us-west4-a.
        spot: whether the slices may be preempted.
        variables: environment variables of the container.
        secrets: names of variables in the script's environment; their values are in no file of the job.
        volumes: path inside the container -> directory of each host.
    """

    name: str
    image: str
    slice: Slice
    num_slices: int
    zone: str
    spot: bool
    variables: dict[str, str]
    secrets: list[str]
    volumes: dict[str, str]


SCRIPT = """\
#!/usr/bin/env bash
# Written by `gptjax launch tpu-vm`. It queues for the slices, trains on them, queues again when they are preempted,
# and deletes them at the end. It needs gcloud with a project, and runs as long as the training: start it in tmux.
set -euo pipefail
cd "$(dirname "$0")"
command -v gcloud >/dev/null || {{
  echo "gcloud is not on PATH; install the Google Cloud CLI" >&2
  exit 2
}}
name={name}
zone={zone}
slices=({slices})
secrets=({secrets})

# A request ends after GCLOUD_TIMEOUT_S, so that a hung gcloud does not block the script. (macOS has no `timeout`.)
tpus() {{
  local limit=(timeout "${{GCLOUD_TIMEOUT_S:-1800}}")
  command -v timeout >/dev/null || limit=(env)
  "${{limit[@]}}" gcloud compute tpus "$@" --zone="$zone"
}}

state() {{ tpus queued-resources describe "$name" --format='value(state.state)'; }}

still_ours() {{ # whether the slices still exist; gcloud may fail once without meaning anything
  local found
  for _ in 1 2 3 4 5; do
    if found=$(state); then
      [ "$found" = ACTIVE ]
      return
    fi
    sleep "${{POLL_S:-30}}"
  done
  echo "gcloud does not report the state of $name; the slices are kept. Start this script again to resume on them" >&2
  exit 1
}}

obtain() {{ # waits for the slices; those of an earlier start of this script are reused
  local found
  state >/dev/null 2>&1 || tpus queued-resources create "$name" {node} \\
    --accelerator-type={accelerator} --runtime-version={runtime}{spot} || return
  while true; do
    found=$(state) || return
    case $found in
      ACTIVE) return 0 ;;
      FAILED | SUSPENDED) return 1 ;;
    esac
    sleep "${{POLL_S:-30}}"
  done
}}

give_back() {{ tpus queued-resources delete "$name" --force --quiet; }}

everywhere() {{ # runs a command on every host of every slice at once; returns the first exit code that is not 0
  local jobs=() code=0 slice job
  for slice in "${{slices[@]}}"; do
    gcloud compute tpus tpu-vm ssh "$slice" --zone="$zone" --worker=all --command="$1" &
    jobs+=($!)
  done
  for job in "${{jobs[@]}}"; do wait "$job" || {{ local last=$?; [ "$code" -ne 0 ] || code=$last; }}; done
  return "$code"
}}

prepare() {{
  local slice secret folder code=0
  folder=$(mktemp -d)
  (
    umask 077
    for secret in "${{secrets[@]}}"; do printf '%s=%s\\n' "$secret" "${{!secret}}"; done >"$folder/gptjax.env"
  )
  for slice in "${{slices[@]}}"; do
    tpus tpu-vm scp config.yaml "$slice":gptjax.yaml --worker=all &&
      tpus tpu-vm scp "$folder/gptjax.env" "$slice":gptjax.env --worker=all || code=$?
  done
  rm -r "$folder"
  [ "$code" -eq 0 ] || return "$code"
  everywhere {pull}
}}

train() {{ everywhere {run}; }}

for secret in "${{secrets[@]}}"; do
  if [ -z "${{!secret:-}}" ] || [[ ${{!secret}} == *$'\\n'* ]]; then
    echo "--secret $secret: set this variable of the environment, to one line, and start the script again" >&2
    exit 2
  fi
done
while true; do
  code=0
  obtain && prepare && train || code=$?
  if [ "$code" -eq 0 ]; then
    give_back
    exit 0
  fi
  if still_ours && [ "$code" -ne 75 ]; then # a failure of the run, not a preemption
    echo "training ended with $code; the slices are kept: gcloud compute tpus queued-resources delete $name" >&2
    exit "$code"
  fi
  echo "the slices were preempted; queueing for them again"
  give_back
  sleep "${{POLL_S:-30}}"
done
"""


def script(job: TpuVmJob) -> str:
    """Return the script, which expects the run's config.yaml in its directory."""
    several = job.num_slices > 1
    node = [f"--node-count={job.num_slices}", f"--node-prefix={job.name}"] if several else [f"--node-id={job.name}"]
    slices = [f"{job.name}-{i}" for i in range(job.num_slices)] if several else [job.name]
    tpu = job.slice.tpu
    registry = job.image.partition("/")[0]
    pull = ["sudo", "gcloud", "auth", "configure-docker", "--quiet", registry]
    return SCRIPT.format(
        name=shlex.quote(job.name),
        zone=shlex.quote(job.zone),
        slices=shlex.join(slices),
        secrets=shlex.join(job.secrets),
        node=shlex.join(node),
        accelerator=f"{tpu.type_prefix}-{job.slice.chips * tpu.cores_per_chip}",
        runtime=tpu.runtime,
        spot=" --spot" if job.spot else "",
        pull=shlex.quote(f"{shlex.join(pull)} && {shlex.join(['sudo', 'docker', 'pull', job.image])}"),
        run=shlex.quote(_docker_run(job)),
    )


def _docker_run(job: TpuVmJob) -> str:
    """Return the command for a host's shell, which expands $HOME."""
    options = ["--rm", "--privileged", "--user=0", "--net=host", "--stop-timeout=120"]  # root: it opens the TPUs
    for name, value in merge_xla_flags(job.variables, "tpu").items():
        options += ["-e", f"{name}={value}"]
    for path, source in job.volumes.items():
        options += ["-v", f"{source}:{path}"]
    files = '--env-file "$HOME/gptjax.env" -v "$HOME/gptjax.yaml:/config.yaml:ro"'
    rest = shlex.join([*options, job.image, "train", "/config.yaml"])
    return f"sudo docker run {files} {rest}"
