#!/usr/bin/env bash
# Builds the test double of the CUDA libraries into a folder: build.sh OUT
set -euo pipefail
mkdir -p "$1"
source=$(dirname "$0")/cuda_stub.c
object=$1/cuda_stub.o
# The libraries' own functions have other arguments than the double's, which nothing here declares.
cc -std=gnu11 -O2 -fPIC -Wall -Wextra -Werror -c "$source" -o "$object"
for name in libcudart.so.13 libcublas.so.13 libcublasLt.so.13 libcurand.so.10 libcuda.so.1; do
    # ONNX Runtime asks for symbols of a version that is the library's name; the driver's have none.
    echo "$name { global: *; };" >"$1/version.map"
    if [[ $name == libcuda.so.1 ]]; then echo "{ global: *; };" >"$1/version.map"; fi
    cc -shared -Wl,-soname,"$name" -Wl,--version-script="$1/version.map" "$object" -o "$1/$name"
done
rm "$object" "$1/version.map"
# The server loads it by this name, and asks for no version.
cc -std=gnu11 -O2 -fPIC -Wall -Wextra -Werror -shared -Wl,-soname,libnvidia-ml.so.1 \
    "$(dirname "$0")/nvml_stub.c" -o "$1/libnvidia-ml.so.1"
