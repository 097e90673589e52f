#!/usr/bin/env bash
# Makes this machine able to run kind, and prints what a caller needs to know as `export` lines:
#   eval "$(tests/cluster/up.sh)"     PATH (kind, kubectl, helm), KIND_IMAGE, BASE_IMAGE, KIND_CONFIG, LLORCH_DOCKERD
# Where images can be pulled, the published kind node and python images are used. Where they cannot, both are built
# from Debian packages and Go modules: about 12 minutes once, then nothing. Idempotent; a warm call takes about a second.
# Docker is started when no daemon runs (installed first with apt when missing); LLORCH_DOCKERD=started then, and
# tests/cluster/down.sh stops it. A daemon that was there already is used as it is, and left alone.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cache=${LLORCH_CACHE:-$HOME/.cache/llorch}/cluster
kubernetes=v1.34.4 etcd_tag=3.6.5-0 coredns_tag=v1.12.1 pause_tag=3.10.1
published_node=kindest/node:v1.37.0@sha256:a1ed56cfb0e7b93589bdf97c8cd566405a265939e3620fc4f5de89adff580ae5
published_python=python:3.11-slim
own_node=llorch-test/node:$kubernetes-$(cat "$here"/node/* | sha256sum | cut -c1-12)
own_python=llorch-test/python:3.11
own_debian=llorch-test/debian:bookworm
say() { echo "cluster: $*" >&2; }
die() { say "$*"; exit 1; }
have() { command -v "$1" > /dev/null; }
has_image() { docker image inspect "$1" > /dev/null 2>&1; }
mkdir -p "$cache/log"
exec 8> "$cache/up.lock" && flock 8

# --- Docker -------------------------------------------------------------------
install() { # PACKAGE…
  [ "$(id -u)" = 0 ] && have apt-get || die "install $* first: this needs root and apt"
  say "installing $*"
  { apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "$@"; } > "$cache/log/apt" 2>&1 ||
    { tail -5 "$cache/log/apt" >&2; die "apt could not install $*"; }
}

start_dockerd() {
  have dockerd && have iptables || install docker.io iptables
  [ "$(id -u)" = 0 ] || die "no Docker daemon answers; start it, or run this as root"
  local settings='{}'
  # A container that asks for a capability which this machine lacks does not start: ask runc for less there.
  if have capsh && ! capsh --has-p=cap_sys_resource > /dev/null 2>&1; then
    cp "$here/runc-capped" "$cache/runc-capped" && chmod +x "$cache/runc-capped"
    settings="{\"runtimes\":{\"capped\":{\"path\":\"$cache/runc-capped\"}},\"default-runtime\":\"capped\"}"
  fi
  echo "$settings" > "$cache/dockerd.json"
  say "starting dockerd"
  setsid dockerd --config-file "$cache/dockerd.json" > "$cache/log/dockerd" 2>&1 8>&- < /dev/null &
  echo $! > "$cache/dockerd.pid"
  for _ in $(seq 100); do docker info > /dev/null 2>&1 && return; sleep 0.3; done
  tail -5 "$cache/log/dockerd" >&2
  die "dockerd did not start"
}

dockerd=found
have docker && docker info > /dev/null 2>&1 || { start_dockerd; dockerd=started; }

# The clusters on a daemon of ours talk among themselves and to this machine, and to nothing else.
if [ "$(cat "/proc/$(cat "$cache/dockerd.pid" 2> /dev/null || echo none)/comm" 2> /dev/null)" = dockerd ]; then
  docker network inspect kind > /dev/null 2>&1 ||
    docker network create -d bridge -o com.docker.network.bridge.name=kind0 -o com.docker.network.bridge.enable_ip_masquerade=true kind > /dev/null
  iptables -C DOCKER-USER -i kind0 ! -o kind0 -m conntrack --ctstate NEW -j REJECT 2> /dev/null ||
    iptables -I DOCKER-USER -i kind0 ! -o kind0 -m conntrack --ctstate NEW -j REJECT
fi

# --- images ---------------------------------------------------------------------
debian_root() { # IMAGE DOCKER-IMPORT-OPTION PACKAGES: a Debian root with these packages
  local root; root=$(mktemp -d)
  debootstrap --variant=minbase --include="$3" bookworm "$root" > "$cache/log/debootstrap" 2>&1 ||
    { tail -5 "$cache/log/debootstrap" >&2; die "debootstrap failed; log: $cache/log/debootstrap"; }
  cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/ca-certificates.crt"  # it trusts what this machine trusts
  rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/* "$root"/usr/share/{doc,locale,man}
  tar -C "$root" -c . | docker import -c "$2" - "$1" > /dev/null
  rm -rf "$root"
}

build_python() {
  say "making the Python base image (once, 1 min)"
  local ca=/etc/ssl/certs/ca-certificates.crt
  debian_root "$own_python" "ENV PIP_CERT=$ca SSL_CERT_FILE=$ca" python3,python3-venv,ca-certificates,libgomp1,libstdc++6
}

image_of() { # NAME FROM DOCKERFILE-REST FILE…: an image of a few programs, remembered in $images
  local name=$1 from=$2 rest=$3 context; shift 3
  context=$(mktemp -d -p "$work") && cp "$@" "$context"
  printf 'FROM %s\nCOPY . /usr/local/bin/\nENV PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\n%s\n' "$from" "$rest" > "$context.Dockerfile"
  docker build -q -t "$name" -f "$context.Dockerfile" "$context" >> "$cache/log/image" 2>&1 || die "no image $name; log: $cache/log/image"
  images+=("$name")
}

build_node() {
  "$here/tools.sh"
  have gcc || install gcc libc6-dev
  work=$cache/image images=()
  rm -rf "$work" && mkdir -p "$work"
  : > "$cache/log/image"
  if ! has_image "$own_debian"; then
    say "making the Debian root of the node image (once, 1 min)"
    debian_root "$own_debian" "ENV container=docker" \
      systemd,systemd-sysv,dbus,iptables,iproute2,kmod,procps,conntrack,ethtool,socat,util-linux,mount,ca-certificates,containerd,runc,containernetworking-plugins,nftables,hostname,curl
  fi
  say "making the node image (once, 1 min)"
  cp "$here"/node/* "$work"
  chmod +x "$work/entrypoint" "$work/podnet"
  gcc -Os -static -s -o "$work/pause" "$work/pause.c"
  for program in kube-apiserver kube-controller-manager kube-scheduler; do
    image_of "registry.k8s.io/$program:$kubernetes" scratch "" "$cache/bin/$program"
  done
  image_of "registry.k8s.io/etcd:$etcd_tag" scratch "" "$cache/bin/etcd"
  image_of "registry.k8s.io/coredns/coredns:$coredns_tag" scratch 'ENTRYPOINT ["coredns"]' "$cache/bin/coredns"
  image_of "registry.k8s.io/pause:$pause_tag" scratch 'ENTRYPOINT ["pause"]' "$work/pause"
  image_of "registry.k8s.io/kube-proxy:$kubernetes" "$own_debian" "" "$cache/bin/kube-proxy" "$cache/bin/kubectl" "$work/podnet"
  docker tag "registry.k8s.io/kube-proxy:$kubernetes" llorch-test/podnet:v1 && images+=(llorch-test/podnet:v1)
  cp "$cache"/bin/{kubeadm,kubelet,kubectl} "$work"
  docker build -q -t llorch-test/node-base --build-arg BASE="$own_debian" --build-arg KUBERNETES_VERSION=$kubernetes "$work" >> "$cache/log/image" 2>&1 ||
    die "no node image; log: $cache/log/image"
  # The control plane's images go into the node's own containerd, as `kind build node-image` does.
  docker rm -f llorch-test-preload > /dev/null 2>&1 || true
  docker run -d --name llorch-test-preload --privileged --entrypoint sleep llorch-test/node-base infinity > /dev/null
  docker exec -d llorch-test-preload containerd
  for _ in $(seq 50); do docker exec llorch-test-preload ctr version > /dev/null 2>&1 && break; sleep 0.2; done
  docker save "${images[@]}" | docker exec -i llorch-test-preload ctr -n k8s.io images import --no-unpack - >> "$cache/log/image" 2>&1
  docker exec llorch-test-preload sh -c 'kill $(pidof containerd); sleep 1; rm -rf /run/containerd'
  docker commit -c 'ENTRYPOINT ["/usr/local/bin/entrypoint","/sbin/init"]' -c 'CMD []' llorch-test-preload "$own_node" > /dev/null
  docker rm -f llorch-test-preload > /dev/null
  docker rmi "${images[@]}" llorch-test/node-base > /dev/null 2>&1 || true
  rm -rf "$work"
}

node=${KIND_IMAGE:-} python=${BASE_IMAGE:-}
for image in "$published_node" "$own_node"; do [ -z "$node" ] && has_image "$image" && node=$image; done
for image in "$published_python" "$own_python"; do [ -z "$python" ] && has_image "$image" && python=$image; done
if [ -z "$node" ] || [ -z "$python" ]; then
  if timeout 10 docker manifest inspect "$published_node" > /dev/null 2>&1; then
    say "pulling $published_node and $published_python (once)"
    [ -n "$node" ] || { docker pull -q "$published_node" > /dev/null && node=$published_node; }
    [ -n "$python" ] || { docker pull -q "$published_python" > /dev/null && python=$published_python; }
  else
    say "no image can be pulled here: building them"
    have debootstrap || install debootstrap
    [ -n "$python" ] || { build_python; python=$own_python; }
    [ -n "$node" ] || { build_node; node=$own_node; }
  fi
fi

# --- programs -------------------------------------------------------------------
missing=()
[ -x "$cache/bin/kind" ] || have kind || missing+=(kind)
[ -x "$cache/bin/helm" ] || have helm || missing+=(helm)
[ -x "$cache/bin/kubectl" ] || have kubectl || missing+=(kube)
[ ${#missing[@]} = 0 ] || "$here/tools.sh" "${missing[@]}"

cat << LINES
export PATH="$cache/bin:\$PATH"
export KIND_IMAGE=$node BASE_IMAGE=$python
export KIND_CONFIG=$here/kind.yaml LLORCH_DOCKERD=$dockerd
LINES
