"""Streams a reply from glmserve and survives broken connections; a reply that is not whole is an error.

pip install httpx; python chat.py "What is the capital of Japan?" [http://127.0.0.1:8000]
"""

import hashlib
import json
import random
import sys
import time
import uuid

import httpx


def read(answer):
    """The id and the data of each event. Not by lines: httpx would also split at a U+2028 in the text."""
    rest = b""
    for part in answer.iter_bytes():
        *events, rest = (rest + part).split(b"\n\n")
        for event in events:
            fields = dict(line.split(": ", 1) for line in event.decode().split("\n") if line[0] != ":")
            if "data" in fields:  # If not, it is a heartbeat.
                yield fields.get("id"), fields["data"]
    raise httpx.RemoteProtocolError("the stream ended without [DONE]")


def stream_chat(client, body, tries=8):
    """Yields the reply's text, piece by piece. By the key the server knows which reply to go on with."""
    headers = {"Idempotency-Key": uuid.uuid4().hex}
    text_hash, seal, failures, wait = hashlib.sha256(), {}, 0, 0
    while True:
        try:
            with client.stream(
                "POST", "/v1/chat/completions", json=body | {"stream": True}, headers=headers
            ) as answer:
                wait = int(answer.headers.get("Retry-After", 0))
                if answer.status_code in (429, 500, 502, 503, 504) and wait <= 60:
                    raise httpx.RemoteProtocolError(answer.read().decode())
                if answer.is_error:
                    raise RuntimeError(answer.read().decode())
                for event_id, data in read(answer):
                    if data == "[DONE]":
                        if seal.get("text_sha256") != text_hash.hexdigest():
                            raise RuntimeError("the reply is not what the server says it sent")
                        return
                    chunk = json.loads(data)
                    if "error" in chunk:
                        raise RuntimeError(chunk["error"]["message"])
                    headers["Last-Event-ID"], seal, failures = event_id, chunk.get("glm", seal), 0
                    text = "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
                    text_hash.update(text.encode())
                    yield text
        except httpx.TransportError:
            failures += 1
            if failures > tries:
                raise
        time.sleep(wait + random.uniform(0, min(0.1 * 2**failures, 5)))


if __name__ == "__main__":
    with httpx.Client(base_url=(sys.argv[2:] or ["http://127.0.0.1:8000"])[0], timeout=30) as client:
        model = client.get("/v1/models").json()["data"][0]["id"]
        messages = [{"role": "user", "content": sys.argv[1]}]
        for text in stream_chat(client, {"model": model, "messages": messages}):
            print(text, end="", flush=True)
