"""The request function of SGLang's load generator, cut out of its own file: SGLang itself is not imported.

It parses every line as JSON, so heartbeats have to be turned off for it.
"""

import argparse
import ast
from importlib.metadata import files

NAMES = {
    "_create_bench_client_session",
    "RequestFuncInput",
    "RequestFuncOutput",
    "get_auth_headers",
    "get_request_headers",
    "_combine_openai_chat_content",
    "_record_server_prompt_len",
    "async_request_openai_chat_completions",
}
IMPORTS = """
import json, os, sys, time, traceback, uuid
from copy import deepcopy
from dataclasses import dataclass, field
from typing import *
import aiohttp
from tqdm.asyncio import tqdm
_ROUTING_KEY_HEADER = "X-SMG-Routing-Key"
def remove_prefix(text, prefix):
    return text[len(prefix):] if text.startswith(prefix) else text
"""


def _module(**arguments):
    (path,) = (f.locate() for f in files("sglang") if str(f) == "sglang/benchmark/serving.py")
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if getattr(node, "name", None) in NAMES]
    module = {"args": argparse.Namespace(disable_ignore_eos=True, **arguments)}
    exec(IMPORTS, module)
    exec(compile(tree, str(path), "exec"), module)
    return module


async def _run(base_url, case, disable_stream=False):
    bench = _module(disable_stream=disable_stream)
    request = bench["RequestFuncInput"](
        prompt=case["say"],
        api_url=base_url + "/chat/completions",
        prompt_len=1,
        output_len=1000,
        model=case["model"],
        lora_name="",
        image_data=None,
        extra_request_body={} if disable_stream else {"stream_options": {"heartbeat": False}},
    )
    output = await bench["async_request_openai_chat_completions"](request)
    assert output.success, output.error
    return {"text": output.generated_text}


async def chat(base_url, case):
    return await _run(base_url, case, disable_stream=True)


async def stream(base_url, case):
    return await _run(base_url, case)


silence = stream
