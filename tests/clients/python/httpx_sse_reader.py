"""httpx-sse's decoder, which keeps the last id and makes an event of every blank line after one."""

import json

import httpx
import httpx_sse


def _arguments(base_url, case, headers):
    body = {"model": case["model"], "messages": [{"role": "user", "content": case["say"]}], "stream": True}
    return {
        "method": "POST",
        "url": base_url + "/chat/completions",
        "json": body | {"temperature": 0},
        "headers": headers or {},
    }


def _text(events):
    documents = [json.loads(event.data) for event in events if event.data != "[DONE]"]
    return "".join(
        choice["delta"].get("content") or "" for document in documents for choice in document["choices"]
    )


def stream(base_url, case, headers=None):
    arguments = _arguments(base_url, case, headers)
    with httpx.Client(timeout=60) as client, httpx_sse.connect_sse(client, **arguments) as source:
        return {"text": _text(source.iter_sse())}


async def async_stream(base_url, case):
    arguments = _arguments(base_url, case, None)
    async with (
        httpx.AsyncClient(timeout=60) as client,
        httpx_sse.aconnect_sse(client, **arguments) as source,
    ):
        return {"text": _text([event async for event in source.aiter_sse()])}


silence = stream


def silence_key(base_url, case):
    return stream(base_url, case, {"Idempotency-Key": "silence"})
