#!/bin/sh
# The daemon's API with curl, from the list of VMs to a commit that has pivoted:
#
#   ./examples/daemon/walkthrough.sh VM DISK [SOCKET]
#
# It really commits: afterwards DISK writes to its base, and its overlay is stale.
set -eu
vm=${1:?give a VM, as the daemon calls it} disk=${2:?give a disk of that VM}
socket=${3:-/run/qmpcommit/qmpcommitd.sock}

api() { # METHOD PATH [CURL OPTIONS]
    method=$1 path=$2
    shift 2
    curl --silent --show-error --fail-with-body --unix-socket "$socket" --request "$method" \
        --header 'Content-Type: application/json' "$@" "http://qmpcommitd$path"
}
member() { # NAME: the text of a member of the JSON object on standard input
    python3 -c 'import json, sys; print(json.load(sys.stdin)[sys.argv[1]])' "$1"
}

echo "== the VMs that it knows, and the disks of $vm"
api GET /v1/vms
echo
api GET "/v1/vms/$vm/disks"
echo

echo "== a window to back up in: the disk's file stands still until the lease ends, or it is closed"
window=$(api POST "/v1/vms/$vm/windows" --data "{\"disks\": [\"$disk\"], \"lease\": 60}") || {
    echo "$window"
    exit 1
}
name=$(echo "$window" | member id)
echo "$window" | member disks
api POST "/v1/windows/$name/lease" --data '{"seconds": 120}' >/dev/null # while the backup runs
api DELETE "/v1/windows/$name" >/dev/null
state=closing
while [ "$state" = closing ]; do
    state=$(api GET "/v1/windows/$name?wait=20" | member state)
done
echo "window: $state"
[ "$state" = done ]

echo "== what a commit would do: nothing is sent"
wanted="{\"disk\": \"$disk\", \"policy\": {\"kind\": \"hold\", \"timeout\": 300}}"
api POST "/v1/vms/$vm/plans" --data "$wanted"
echo

echo "== ask for it; the key makes the request safe to repeat"
key="walkthrough-$$-$(date +%s)"
id=$(api POST "/v1/vms/$vm/commits" --header "Idempotency-Key: $key" --data "$wanted" | member id)
again=$(api POST "/v1/vms/$vm/commits" --header "Idempotency-Key: $key" --data "$wanted" | member id)
[ "$id" = "$again" ]
echo "commit $id, asked for twice, promised once"

echo "== wait until it leaves each phase, up to READY"
phase=""
while [ "$phase" != ready ]; do
    phase=$(api GET "/v1/commits/$id?wait=20&phase=$phase" | member phase)
    echo "phase: $phase"
    [ "$phase" != finished ] || exit 1
done

echo "== the second phase: the guest is to write to the base"
api POST "/v1/commits/$id/decision" --data '{"action": "pivot"}' >/dev/null
phase=ready
while [ "$phase" != finished ]; do
    phase=$(api GET "/v1/commits/$id?wait=20" | member phase)
done
api GET "/v1/commits/$id" | member outcome

echo "== what was told of it meanwhile, from the journal"
api GET "/v1/events?after=0&commit=$id" --max-time 1 --no-buffer 2>/dev/null || true

echo "== what Prometheus reads"
api GET /metrics | grep '^qmpcommit_commits_total'
