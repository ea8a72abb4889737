#!/bin/bash
# Runs as root on every host of a TPU slice at each of its boots: fetches the code, installs it once, and starts the same
# program on every host. Whatever goes wrong is told in the bucket, and the slice is given back.
set -Eeuo pipefail
meta() { python3 -c 'import os, sys, urllib.request as web
host = os.environ.get("GCE_METADATA_HOST", "metadata.google.internal")
asked = web.Request(f"http://{host}/computeMetadata/v1/instance/{sys.argv[1]}", headers={"Metadata-Flavor": "Google"})
print(web.urlopen(asked, timeout=10).read().decode(), end="")' "$1"; }
again() { for wait in 2 8 32 0; do "$@" && return 0; sleep "$wait"; done; return 1; }

work=${LAB_WORK:-/var/lib/lab}
export HOME=${HOME:-/root} LAB_CACHE=${LAB_CACHE:-$work/cache}
mkdir -p "$work"
exec 9>"$work/lock"
flock -n 9 || exit 0            # it runs already; the lock goes with the process
exec >>"$work/startup.log" 2>&1
echo "$(date -u +%FT%TZ) boot"
rm -f /tmp/libtpu_lockfile      # left by a process that was killed, it would stop the next one

again meta attributes/lab-config >"$work/config.json.part" && mv "$work/config.json.part" "$work/config.json"
field() { python3 -c 'import json, sys; print(json.load(open(sys.argv[1])).get(sys.argv[2]) or "")' "$work/config.json" "$1"; }
task=$(field task) folder=$(field folder) zone=$(field zone) archive=$(field archive) python=$(field python)
worker=$(meta attributes/agent-worker-number || echo 0)

give_up() {
  code=$?
  trap - ERR
  echo "setup failed with status $code"
  node=$(meta attributes/instance-id || hostname)
  printf '{"done": true, "setup": %d, "time": %d, "codes": {}}' "$code" "$(date +%s)" >"$work/setup.json"
  gcloud storage cp "$work/startup.log" "$folder/setup-$node-$worker.log" --quiet || true
  gcloud storage cp "$work/setup.json" "$folder/setup-$node-$worker.json" --quiet || true
  gcloud compute tpus queued-resources delete "$task" --zone "$zone" --force --async --quiet || true
  exit "$code"
}
trap give_up ERR

code="$work/$(basename "$archive" .tar.gz)"
if [ ! -e "$code/.unpacked" ]; then
  again gcloud storage cp "$archive" "$work/code.tar.gz" --quiet
  mkdir -p "$code"
  tar -xzf "$work/code.tar.gz" -C "$code"
  touch "$code/.unpacked"
fi
if [ -z "$python" ]; then
  python="$code/.venv/bin/python"
  if [ ! -e "$code/.installed" ]; then   # the images' Python is older than JAX wants
    again python3 -m pip install -q --target "$work/uv" uv
    uv="$work/uv/bin/uv"
    again "$uv" venv -q --clear --python 3.12 "$code/.venv"
    (cd "$code" && again "$uv" pip install -q --python "$python" -c constraints.txt '.[tpu,gcs]')
    touch "$code/.installed"
  fi
fi
cd "$code"
"$python" -c 'import launch.machine'
trap - ERR
exec "$python" -m launch.machine "$work/config.json"
