"""Clients in Python across silences: the official one, and the reading loops of widespread tools.

Called by ../it/clients.rs with the address of its server, which sends heartbeats every few milliseconds and
plays what the message says. Each client has to get the whole text; what fails is printed and counted by the
exit status.
"""

import asyncio
import http.client
import json
import sys
import traceback
import uuid
from urllib.parse import urlsplit

import openai
import requests

# 入 has the byte 0x85, which is a line break in ISO-8859-1.
TEXT = "入门：你好，世界"
# Silent before the first token and in mid-reply, for many heartbeats.
COMMAND = f"hush 300 {TEXT}"


def body(**options) -> dict:
    messages = [{"role": "user", "content": COMMAND}]
    return {"model": "test-model", "temperature": 0, "stream": True, "messages": messages} | options


def content(chunk: dict) -> str:
    return "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])


def openai_sync(url: str, headers: dict) -> str:
    client = openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)
    stream = client.chat.completions.create(**body(), extra_headers=headers)
    return "".join(content(chunk.model_dump()) for chunk in stream)


def openai_async(url: str, headers: dict) -> str:
    async def read() -> str:
        client = openai.AsyncOpenAI(base_url=url + "/v1", api_key="none", max_retries=0)
        stream = await client.chat.completions.create(**body(), extra_headers=headers)
        return "".join([content(chunk.model_dump()) async for chunk in stream])

    return asyncio.run(read())


def requests_lines(url: str, headers: dict) -> str:
    """Decodes by the charset that the server names, and splits at every line break of Unicode."""
    text = ""
    with requests.post(
        url + "/v1/chat/completions", json=body(), headers=headers, stream=True, timeout=30
    ) as answer:
        for line in answer.iter_lines(decode_unicode=True):
            if line.startswith("data: ") and line != "data: [DONE]":
                text += content(json.loads(line.removeprefix("data: ")))
    return text


def network_reads(url: str, payload: dict, headers: dict):
    """The parts of the answer as they come."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
    headers = {"Content-Type": "application/json"} | headers
    connection.request("POST", "/v1/chat/completions", json.dumps(payload), headers)
    answer = connection.getresponse()
    assert answer.status == 200, answer.read()
    while part := answer.read1(65536):
        yield part
    connection.close()


def stripped_reads(url: str, headers: dict) -> str:
    """Like vLLM's load generator: each read is stripped; a blank line or whole JSON ends an event."""
    text, rest, done = "", "", False

    def take(message: str) -> None:
        nonlocal text, done
        if message.startswith(":") or not message:
            return
        data = message.removeprefix("data: ")
        if data == "[DONE]":
            done = True
        else:
            text += content(json.loads(data))

    for part in network_reads(url, body(), headers):
        rest += part.strip().decode()
        *messages, rest = rest.split("\n\n")
        for message in messages:
            take(message.strip())
        data = rest.removeprefix("data: ")
        if data != rest:
            try:
                data == "[DONE]" or json.loads(data)
            except json.JSONDecodeError:
                continue
            take(rest)
            rest = ""
    assert done and not rest, f"lost: {rest!r}"
    return text


def every_line_is_json(url: str, headers: dict) -> str:
    """Like SGLang's load generator, which needs heartbeats off."""
    text = ""
    payload = body(stream_options={"heartbeat": False})
    for line in b"".join(network_reads(url, payload, headers)).splitlines():
        data = line.strip().decode().removeprefix("data: ")
        if data and data != "[DONE]":
            text += content(json.loads(data))
    return text


# Those that cannot read `id:` lines never ask for them.
CLIENTS = {
    openai_sync: (False, True),
    openai_async: (False, True),
    requests_lines: (False, True),
    stripped_reads: (False,),
    every_line_is_json: (False,),
}


def main(url: str) -> int:
    num_failures = 0
    for client, ways in CLIENTS.items():
        for has_key in ways:
            headers = {"Idempotency-Key": uuid.uuid4().hex} if has_key else {}
            try:
                text = client(url, headers)
                assert text == TEXT, f"got {text!r}"
            except Exception:
                num_failures += 1
                print(f"{client.__name__}, key: {has_key}:\n{traceback.format_exc()}")
    return num_failures


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
