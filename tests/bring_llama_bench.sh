#!/usr/bin/env bash
# Builds llama.cpp's own llama-batched-bench into .segue/llama.cpp/, for `make bench` to compare the embedded engine with (some 10
# CPU-minutes, once). The source comes with the sdist of llama-cpp-python, the instruction sets are those that Segue is built for.
set -euo pipefail
cd "$(dirname "$0")/.."
version=0.3.36
home=$PWD/.segue/llama.cpp
if [ -x "$home/$version/bin/llama-batched-bench" ]; then exit 0; fi
test -x .segue/peers/bin/python || python3 -m venv .segue/peers
mkdir -p "$home/download"
.segue/peers/bin/python -m pip download --quiet --disable-pip-version-check --no-deps --no-binary :all: \
  --dest "$home/download" "llama-cpp-python==$version"
tar xzf "$home/download/llama_cpp_python-$version.tar.gz" -C "$home"
instructions=$(sed -n 's/^\(GGML_[A-Z0-9_]*\) = "\(.*\)"/-D\1=\2/p' .segue/cargo.toml)
# shellcheck disable=SC2086 # words are wanted
.segue/tools/cmake -S "$home/llama_cpp_python-$version/vendor/llama.cpp" -B "$home/build" -DCMAKE_BUILD_TYPE=Release \
  -DBUILD_SHARED_LIBS=OFF -DGGML_NATIVE=OFF -DGGML_OPENMP=ON $instructions -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
  -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_TOOLS=ON -DLLAMA_OPENSSL=OFF -DLLAMA_CURL=OFF > "$home/build.log" 2>&1
.segue/tools/cmake --build "$home/build" --target llama-batched-bench --parallel "$(nproc)" >> "$home/build.log" 2>&1
mkdir -p "$home/$version/bin"
cp "$home/build/bin/llama-batched-bench" "$home/$version/bin/"
rm -rf "$home/build" "$home/llama_cpp_python-$version" "$home/download"
