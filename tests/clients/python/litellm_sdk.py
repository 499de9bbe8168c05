"""litellm, as it talks to a server that it takes for vLLM's."""

import os

# It would otherwise fetch a list of prices.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import litellm


def _request(base_url, case, **options):
    messages = [{"role": "user", "content": case["say"]}]
    request = {"model": "hosted_vllm/" + case["model"], "api_base": base_url, "api_key": "none"}
    return request | {"messages": messages, "temperature": 0, "num_retries": 0} | options


def _text(chunks):
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)


def chat(base_url, case):
    answers = [litellm.completion(**_request(base_url, case)) for _ in range(3)]
    (text,) = {answer.choices[0].message.content for answer in answers}
    return {"text": text}


def stream(base_url, case):
    return {"text": _text(litellm.completion(**_request(base_url, case, stream=True)))}


def usage(base_url, case):
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(litellm.completion(**_request(base_url, case, **options)))
    return {"text": _text(chunks), "completion_tokens": chunks[-1].usage.completion_tokens}


async def async_stream(base_url, case):
    chunks = await litellm.acompletion(**_request(base_url, case, stream=True))
    return {"text": _text([chunk async for chunk in chunks])}


silence = stream


def overflow(base_url, case):
    try:
        litellm.completion(**_request(base_url, {**case, "say": "x" * 20_000}))
    except litellm.ContextWindowExceededError:
        return {"is_recognised": True}
    return {"is_recognised": False}
