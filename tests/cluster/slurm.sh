#!/usr/bin/env bash
# A Slurm cluster of two nodes on this machine, for tests: Debian's slurm-wlm and munge, as root.
#   tests/cluster/slurm.sh up DIR     starts it; SLURM_CONF=DIR/slurm.conf is then what Slurm's commands need
#   tests/cluster/slurm.sh down DIR   ends it
set -euo pipefail
dir=$(realpath -m "$2")
export SLURM_CONF=$dir/slurm.conf

up() {
  mkdir -p "$dir"/{munge,state,n1,n2}
  chmod 711 "$dir" "$dir/munge"
  dd if=/dev/urandom of="$dir/munge/key" bs=1024 count=1 status=none
  chmod 400 "$dir/munge/key"
  munged --force --key-file="$dir/munge/key" --socket="$dir/munge/socket" --pid-file="$dir/munge/pid" \
    --log-file="$dir/munge/log" --seed-file="$dir/munge/seed"
  # No cgroups in a container: linuxproc and task/none. A requeued job waits until its credential has expired.
  cat >"$SLURM_CONF" <<EOF
ClusterName=gptjax
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=16817
SlurmctldPidFile=$dir/slurmctld.pid
SlurmctldLogFile=$dir/slurmctld.log
StateSaveLocation=$dir/state
SlurmUser=root
AuthInfo=socket=$dir/munge/socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
MpiDefault=none
ReturnToService=2
SlurmdPidFile=$dir/%n/pid
SlurmdLogFile=$dir/%n/log
SlurmdSpoolDir=$dir/%n
NodeName=n1 NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=17001
NodeName=n2 NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=17002
PartitionName=main Nodes=ALL Default=YES
EOF
  slurmctld
  slurmd -N n1
  slurmd -N n2
  for _ in $(seq 60); do
    [ "$(sinfo --noheader --format=%D --states=idle)" = 2 ] && exit 0
    sleep 1
  done
  sinfo >&2
  exit 1
}

down() {
  scancel --user=root || true
  for file in n1/pid n2/pid slurmctld.pid munge/pid; do
    [ -f "$dir/$file" ] && kill "$(cat "$dir/$file")" || true
  done
}

"$1"
