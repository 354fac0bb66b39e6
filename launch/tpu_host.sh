#!/bin/bash
# On a host of Google Cloud: runs a command, and sends it SIGTERM when the platform gives notice that
# it takes the machine back. Used by launch/tpu_vm.sh.
#
#   launch/tpu_host.sh alignjax run sft.yaml
set -u

url=${METADATA_URL:-http://metadata.google.internal/computeMetadata/v1/instance}

pid=
is_signalled=0
hand_on() {
  is_signalled=1
  if [ -n "$pid" ]; then
    kill -TERM "$pid" 2>/dev/null
  fi
}
trap hand_on TERM INT HUP

"$@" </dev/null &
pid=$!
if [ "$is_signalled" -eq 1 ]; then
  hand_on # it came before there was anybody to hand it on to
fi

while sleep "${POLL_SECONDS:-5}"; do
  for key in preempted maintenance-event; do
    case $(curl --silent --max-time 5 --header "Metadata-Flavor: Google" "$url/$key") in
      TRUE | TERMINATE_ON_HOST_MAINTENANCE)
        echo "tpu_host.sh: notice of the platform ($key)" >&2
        kill -TERM "$pid"
        exit
        ;;
    esac
  done
done &
watcher=$!

# A signal that is trapped ends wait, not the command.
is_signalled=1
while [ "$is_signalled" -eq 1 ]; do
  is_signalled=0
  wait "$pid"
  status=$?
done
kill "$watcher" 2>/dev/null
echo "tpu_host.sh: exit $status" >&2
exit "$status"
