"""TPU slices of Google Cloud without Kubernetes: a script of gcloud's commands."""

from typing import NamedTuple

from gptjax.apps.launch.clusters import XLA_FLAGS, Slice


class TpuVmJob(NamedTuple):
    """What Google is to be asked for.

    Attributes:
        name: of the queued resource, and of its slices.
        image: built from the repository's Dockerfile with the extra tpu; the VMs' own Python is too old.
        slice: the TPUs.
        num_slices: joined by the data-centre network.
        zone: such as us-west4-a.
        spot: whether they may be taken away.
    """

    name: str
    image: str
    slice: Slice
    num_slices: int
    zone: str
    spot: bool


SCRIPT = """\
#!/usr/bin/env bash
# Written by `gptjax launch tpu-vm`. It queues for the slices, trains on them, queues again when they are taken away,
# and gives them back at the end. It needs gcloud with a project, and lives as long as the run: start it in tmux.
set -euo pipefail
cd "$(dirname "$0")"
name={name}
zone={zone}
slices=({slices})

state() {{ gcloud compute tpus queued-resources describe "$name" --zone="$zone" --format='value(state.state)'; }}

obtain() {{ # until the slices are there
  gcloud compute tpus queued-resources create "$name" --zone="$zone" {node} \\
    --accelerator-type={accelerator} --runtime-version={runtime}{spot}
  until [ "$(state)" = ACTIVE ]; do
    case $(state) in FAILED | SUSPENDED) return 1 ;; esac
    sleep "${{POLL_S:-30}}"
  done
}}

give_back() {{ gcloud compute tpus queued-resources delete "$name" --zone="$zone" --force --quiet; }}

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
  local slice
  for slice in "${{slices[@]}}"; do
    gcloud compute tpus tpu-vm scp config.yaml "$slice":gptjax.yaml --zone="$zone" --worker=all
  done
  everywhere "sudo gcloud auth configure-docker --quiet {registry} && sudo docker pull {image}"
}}

train() {{
  everywhere "sudo docker run --rm --privileged --net=host --stop-timeout=120 -v \\$HOME/gptjax.yaml:/config.yaml \\
    -e {variable}='{flags}' {image} train /config.yaml"
}}

while true; do
  code=0
  obtain && prepare && train || code=$?
  if [ "$code" -eq 0 ]; then
    give_back
    exit 0
  fi
  if [ "$(state)" = ACTIVE ] && [ "$code" -ne 75 ]; then # the run's own fault, and nobody's preemption
    echo "training ended with $code; the slices are kept: gcloud compute tpus queued-resources delete $name" >&2
    exit "$code"
  fi
  echo "the slices were taken away; queueing for them again"
  give_back
done
"""


def script(job: TpuVmJob) -> str:
    """The script, to lie beside the run's config.yaml."""
    several = job.num_slices > 1
    node = f"--node-count={job.num_slices} --node-prefix={job.name}" if several else f"--node-id={job.name}"
    slices = [f"{job.name}-{i}" for i in range(job.num_slices)] if several else [job.name]
    tpu = job.slice.tpu
    variable, flags = XLA_FLAGS["tpu"]
    return SCRIPT.format(
        name=job.name,
        zone=job.zone,
        slices=" ".join(slices),
        node=node,
        accelerator=f"{tpu.type_prefix}-{job.slice.chips * tpu.cores_per_chip}",
        runtime=tpu.runtime,
        spot=" --spot" if job.spot else "",
        image=job.image,
        registry=job.image.partition("/")[0],
        variable=variable,
        flags=" ".join(flags),
    )
