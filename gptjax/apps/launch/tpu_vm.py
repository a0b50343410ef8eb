"""TPU slices of Google Cloud without Kubernetes: a script of gcloud's commands."""

import shlex
from typing import NamedTuple

from gptjax.apps.launch.clusters import Slice
from gptjax.apps.launch.container import merge_xla_flags


class TpuVmJob(NamedTuple):
    """What Google is to be asked for.

    Attributes:
        name: of the queued resource, and of its slices.
        image: built from the repository's Dockerfile with the extra tpu; the VMs' own Python is too old.
        slice: the TPUs.
        num_slices: joined by the data-centre network.
        zone: such as us-west4-a.
        spot: whether they may be taken away.
        variables: of the container's environment.
        secrets: variables that the script's own environment has; their values are in no file of the job.
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
# Written by `gptjax launch tpu-vm`. It queues for the slices, trains on them, queues again when they are taken away,
# and gives them back at the end. It needs gcloud with a project, and lives as long as the run: start it in tmux.
set -euo pipefail
cd "$(dirname "$0")"
command -v gcloud >/dev/null || {{
  echo "there is no gcloud on PATH; install the Google Cloud CLI" >&2
  exit 2
}}
name={name}
zone={zone}
slices=({slices})
secrets=({secrets})

# A request ends after GCLOUD_TIMEOUT_S, so that a hung gcloud stops nothing for good. (macOS has no `timeout`.)
tpus() {{
  local limit=(timeout "${{GCLOUD_TIMEOUT_S:-1800}}")
  command -v timeout >/dev/null || limit=(env)
  "${{limit[@]}}" gcloud compute tpus "$@" --zone="$zone"
}}

state() {{ tpus queued-resources describe "$name" --format='value(state.state)'; }}

still_ours() {{ # whether the slices are there; one answer of gcloud that is missing proves nothing
  local found
  for _ in 1 2 3 4 5; do
    if found=$(state); then
      [ "$found" = ACTIVE ]
      return
    fi
    sleep "${{POLL_S:-30}}"
  done
  echo "gcloud does not tell the state of $name; the slices are kept. Start this script again to go on with them" >&2
  exit 1
}}

obtain() {{ # until the slices are there; those of an earlier start of this script are taken over
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

everywhere() {{ # a command, on every host of every slice at once; the first code that is not 0
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
  if still_ours && [ "$code" -ne 75 ]; then # the run's own fault, and nobody's preemption
    echo "training ended with $code; the slices are kept: gcloud compute tpus queued-resources delete $name" >&2
    exit "$code"
  fi
  echo "the slices were taken away; queueing for them again"
  give_back
  sleep "${{POLL_S:-30}}"
done
"""


def script(job: TpuVmJob) -> str:
    """Return the script, to lie beside the run's config.yaml."""
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
    """The command of one host's shell, which alone knows $HOME."""
    options = ["--rm", "--privileged", "--user=0", "--net=host", "--stop-timeout=120"]  # root: it opens the TPUs
    for name, value in merge_xla_flags(job.variables, "tpu").items():
        options += ["-e", f"{name}={value}"]
    for path, source in job.volumes.items():
        options += ["-v", f"{source}:{path}"]
    files = '--env-file "$HOME/gptjax.env" -v "$HOME/gptjax.yaml:/config.yaml:ro"'
    rest = shlex.join([*options, job.image, "train", "/config.yaml"])
    return f"sudo docker run {files} {rest}"
