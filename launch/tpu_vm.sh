#!/bin/bash
# A TPU slice by gcloud alone: made, used and, when it is preempted, made again. From any machine:
#
#   ZONE=us-west4-a TYPE=v5litepod-256 VERSION=v2-alpha-tpuv5-lite IMAGE=REGISTRY/alignjax:tpu \
#     NFS=10.0.0.2:/share launch/tpu_vm.sh first run sft.yaml
#
# The first word names the slice, the others are those of alignjax. IMAGE is of launch/Dockerfile;
# NFS, such as a Filestore instance, holds the config, the data and output_dir. It ends when the
# command does, and leaves the slice for the next one: gcloud compute tpus tpu-vm delete.
set -u

: "${ZONE:?}" "${TYPE:?}" "${VERSION:?}" "${IMAGE:?}" "${NFS:?}"
name=${1:?the name of the slice}
shift
here=$(dirname "$0")

tpu() { # a verb of gcloud, and its arguments after the name
  local verb=$1
  shift
  gcloud compute tpus tpu-vm "$verb" "$name" --zone="$ZONE" --quiet "$@"
}

state() {
  tpu describe --format="value(state)" 2>/dev/null || echo NONE
}

make() {
  if [ "$(state)" != NONE ]; then
    tpu delete || return
  fi
  tpu create --accelerator-type="$TYPE" --version="$VERSION" --spot
}

words=$(printf " %q" "$@")
container="docker run --rm --privileged --network=host --volume=/data:/data --workdir=/data"
# tpu_host.sh as root, or it could not send a signal to what runs as root.
command="sudo mkdir -p /data && { mountpoint -q /data || sudo mount -t nfs $NFS /data; } &&
  sudo bash tpu_host.sh $container --env=ALIGNJAX_PROCESSES=auto $IMAGE$words"

while true; do
  until [ "$(state)" = READY ]; do
    make || sleep "${RETRY_SECONDS:-60}" # no capacity
  done
  gcloud compute tpus tpu-vm scp "$here/tpu_host.sh" "$name:" --zone="$ZONE" --quiet --worker=all
  log=$(mktemp)
  tpu ssh --worker=all --command="$command" 2>&1 | tee "$log"
  status=${PIPESTATUS[0]}
  # gcloud has a status of its own: what the hosts say tells why they ended.
  is_saved=$(grep -c "tpu_host.sh: exit 75" "$log")
  rm -f "$log"
  if [ "$status" -eq 0 ]; then
    exit 0
  fi
  if [ "$is_saved" -eq 0 ] && [ "$(state)" = READY ]; then
    exit "$status" # no preemption: what it printed says why
  fi
done
