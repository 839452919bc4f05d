#!/usr/bin/env bash
# A run on a real Kubernetes (the current kubectl context, with both images loaded and the chart installed): one worker
# is deleted while it trains, and the run must come back and succeed. Leaves everything there to be looked at.
set -euo pipefail
cd "$(dirname "$0")"

say() { printf '\n== %s\n' "$*"; }
field() { kubectl get trun clio-tiny -o jsonpath="{$1}"; }

until_true() { # WHAT SECONDS COMMAND...: asks once a second
  local what=$1 left=$2
  shift 2
  until "$@"; do
    ((left-- > 0)) || { echo "not within the time given: $what" >&2; return 1; }
    sleep 1
  done
  echo "$what"
}
has_checkpoint() { [[ $(field .status.checkpoint.step) -gt 0 ]]; }
has_recovered() { [[ $(field .status.recoveries) -ge 1 && $(field .status.phase) != Recovering ]]; }
tell() {
  kubectl get trun,pods -o wide || true
  kubectl describe trun clio-tiny || true
  kubectl logs -n mend-system -l app.kubernetes.io/name=mend-controller --tail 200 || true
}
trap 'code=$?; ((code == 0)) || tell; exit $code' EXIT

say "an object store with a bucket"
kubectl apply -f object-store.yaml
kubectl rollout status deployment/object-store --timeout 3m
kubectl exec deployment/object-store -- python -c \
  'import boto3; boto3.client("s3", endpoint_url="http://127.0.0.1:9000").create_bucket(Bucket="mend")'

say "a bad run is refused by the API server"
if sed 's/replicas: 2/replicas: 0/' run.yaml | kubectl apply -f - 2>/tmp/refused; then
  echo "replicas: 0 was accepted" >&2
  exit 1
fi
grep -q 'spec.workers.replicas' /tmp/refused

say "a run"
kubectl apply -f run.yaml
until_true "it has a checkpoint" 600 has_checkpoint

say "one worker is taken away"
kubectl delete pod -l mend.dev/run=clio-tiny,mend.dev/worker=1 --wait=false
until_true "it has recovered" 300 has_recovered
kubectl wait trun/clio-tiny --for 'jsonpath={.status.phase}=Succeeded' --timeout 15m
kubectl get trun -o wide

say "the incident is in the status"
[[ $(field '.status.incidents[0].culpritWorkers[0]') == 1 ]]
field '.status.incidents[0]'
echo
