#!/usr/bin/env bash
# Serves the default model on a free port and measures it; further arguments go to `glmserve bench`.
set -euo pipefail
cd "$(dirname "$0")/../.."

log=$(mktemp)
# Prompts of random words make a small model repeat itself: draft tokens would flatter it.
target/release/glmserve serve --model .models/smollm2-135m-instruct --port 0 --log-format json \
    --speculative-tokens 0 >"$log" 2>&1 &
server=$!
trap 'kill $server 2>/dev/null; wait $server 2>/dev/null || true; rm -f "$log"' EXIT
until grep -q '"ready"' "$log"; do
    kill -0 $server 2>/dev/null || { cat "$log" >&2; exit 1; }
    sleep 0.1
done
address=$(grep -oE '127\.0\.0\.1:[0-9]+' "$log" | head -n 1)
target/release/glmserve bench --base-url "http://$address" --pid $server "$@"
.venv/bin/python tests/bench/flips.py --url "http://$address" --max-tokens 64
