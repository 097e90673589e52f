#!/usr/bin/env bash
# Stops the Docker daemon that tests/cluster/up.sh started, and only that one. Images and built programs stay.
set -euo pipefail
cache=${LLORCH_CACHE:-$HOME/.cache/llorch}/cluster
[ -f "$cache/dockerd.pid" ] || exit 0
pid=$(cat "$cache/dockerd.pid")
if [ "$(cat "/proc/$pid/comm" 2> /dev/null)" = dockerd ]; then
  kill "$pid"
  for _ in $(seq 100); do kill -0 "$pid" 2> /dev/null || break; sleep 0.2; done
fi
rm -f "$cache/dockerd.pid"
