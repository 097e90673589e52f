#!/bin/sh
# Builds the engine, llama-server, from the llama.cpp sources that the llama-cpp-python sdist carries, as one static
# binary: $LLORCH_ENGINE_CACHE/<version>/llama-server. Prints that path as its last line; a second run only prints it.
# Beside it goes llama-fit-params, which tells the memory need of models whose header does not.
#
#   LLORCH_ENGINE_VERSION   version of llama-cpp-python, default 0.3.36
#   LLORCH_ENGINE_CACHE     where the binary goes, default ~/.cache/llorch/engine
#   LLORCH_CUDA=1           for NVIDIA GPUs; needs nvcc. The binary goes to <version>-cuda/
#   LLORCH_CMAKE_ARGS       further arguments for cmake, e.g. -DCMAKE_CUDA_ARCHITECTURES=89
#   LLORCH_JOBS             parallel compile jobs, default the number of cores
#
# Needs a C++ compiler and Python with pip and venv; cmake and ninja are fetched with pip where missing.
set -eu

version=${LLORCH_ENGINE_VERSION:-0.3.36}
cache=${LLORCH_ENGINE_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/llorch/engine}
jobs=${LLORCH_JOBS:-$(nproc 2>/dev/null || echo 2)}
python=${PYTHON:-python3}
cuda=OFF
target=$cache/$version
case ${LLORCH_CUDA:-0} in
    0 | "") ;;
    *)
        cuda=ON
        target=$cache/$version-cuda
        ;;
esac

fail() {
    echo "build-engine: $1" >&2
    exit 1
}

if [ -x "$target/llama-server" ]; then
    echo "$target/llama-server"
    exit 0
fi

command -v c++ >/dev/null || fail "no C++ compiler: install g++ or clang, or use the xllamacpp wheel (pip install xllamacpp)"
if [ $cuda = ON ] && ! command -v nvcc >/dev/null && [ -z "${CUDACXX:-}" ]; then
    fail "LLORCH_CUDA=1 needs nvcc on PATH, or its path in CUDACXX"
fi

mkdir -p "$target"
work=$(mktemp -d "$target/build.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM

if ! command -v cmake >/dev/null || ! command -v ninja >/dev/null; then
    "$python" -m venv "$work/tools"
    "$work/tools/bin/pip" install --quiet --disable-pip-version-check cmake ninja
    PATH=$work/tools/bin:$PATH
fi

echo "build-engine: fetching llama-cpp-python $version" >&2
"$python" -m pip download --quiet --disable-pip-version-check --no-deps --no-binary :all: \
    --dest "$work" "llama-cpp-python==$version" >"$work/pip.log" 2>&1 || true
sdist=$(find "$work" -maxdepth 1 -name 'llama_cpp_python-*.tar.gz' | head -n 1)
[ -n "$sdist" ] || fail "pip could not download the sdist: $(tail -n 1 "$work/pip.log")"
mkdir "$work/src"
tar -xzf "$sdist" -C "$work/src" --strip-components=1
rm "$sdist"

# GGML_NATIVE=OFF: a binary built for the builder's CPU dies with SIGILL on an older one.
# shellcheck disable=SC2086
cmake -S "$work/src/vendor/llama.cpp" -B "$work/build" -G Ninja -DCMAKE_BUILD_TYPE=Release \
    -DBUILD_SHARED_LIBS=OFF -DGGML_NATIVE=OFF -DGGML_CUDA=$cuda \
    -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF \
    ${LLORCH_CMAKE_ARGS:-} >"$work/cmake.log" 2>&1 || {
    tail -n 20 "$work/cmake.log" >&2
    fail "cmake failed"
}
echo "build-engine: compiling llama-server (minutes; $jobs jobs)" >&2
ninja -C "$work/build" -j "$jobs" llama-server llama-fit-params >"$work/ninja.log" 2>&1 || {
    tail -n 40 "$work/ninja.log" >&2
    fail "the build failed"
}

strip "$work/build/bin/llama-server" "$work/build/bin/llama-fit-params" 2>/dev/null || true
"$work/build/bin/llama-server" --version >/dev/null 2>&1 || fail "the built llama-server does not run"
mv "$work/build/bin/llama-fit-params" "$target/llama-fit-params"
mv "$work/build/bin/llama-server" "$target/llama-server.new"
mv "$target/llama-server.new" "$target/llama-server"
echo "$target/llama-server"
