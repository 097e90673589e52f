#!/usr/bin/env bash
# Builds the cluster programs (etcd, the Kubernetes binaries, kind, helm, CoreDNS) from their Go modules.
#
# Used where no container image can be pulled and no release downloaded; `go install tool` needs only the Go
# module proxy. Idempotent: each program's stamp is the hash of its module files, so a warm call takes 0.1 s.
#   tests/cluster/tools.sh [TOOL…]     default: kube etcd kind helm coredns
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cache=${LLORCH_CACHE:-$HOME/.cache/llorch}/cluster
kubernetes=v1.34.4
say() { echo "cluster: $*" >&2; }
command -v go > /dev/null || { say "no Go on PATH: install Go 1.25 or newer, or put kube-apiserver, etcd, kubectl, kind and helm on PATH"; exit 1; }
mkdir -p "$cache/bin" "$cache/log"
exec 9> "$cache/lock" && flock 9

for tool in "${@:-kube etcd kind helm coredns}"; do for tool in $tool; do
  stamp=$cache/bin/.$tool-$(cat "$here/tools/$tool"/* | sha256sum | cut -c1-12)
  [ -f "$stamp" ] && continue
  say "building $tool (once; log: $cache/log/$tool)"
  flags="-s -w"
  if [ "$tool" = kube ]; then
    for package in k8s.io/component-base/version k8s.io/client-go/pkg/version; do
      flags="$flags -X $package.gitVersion=$kubernetes -X $package.gitMajor=1 -X $package.gitMinor=34 -X $package.gitTreeState=clean"
    done
  fi
  (cd "$here/tools/$tool" && export CGO_ENABLED=0 GOFLAGS=-mod=readonly GOBIN=$cache/bin
   if [ -f main.go ]; then go build -trimpath -ldflags "$flags" -o "$cache/bin/$tool" .
   else go install -trimpath -ldflags "$flags" tool; fi) > "$cache/log/$tool" 2>&1 || { tail -20 "$cache/log/$tool" >&2; exit 1; }
  [ "$tool" = etcd ] && mv "$cache/bin/server" "$cache/bin/etcd"
  rm -f "$cache/bin/.$tool-"* && touch "$stamp"
done; done
