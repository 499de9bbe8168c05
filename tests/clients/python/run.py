"""Calls one function of a program: `run.py PROGRAM ABILITY BASE_URL`, the case as JSON on standard input."""

import asyncio
import inspect
import json
import runpy
import sys

program, ability, base_url = sys.argv[1:]
functions = runpy.run_path(program)
function = functions["async_stream" if ability.endswith("async") else ability]
answer = function(base_url, json.load(sys.stdin))
if inspect.iscoroutine(answer):
    answer = asyncio.run(answer)
print("\n" + json.dumps(answer))
