"""Streams a reply from glmserve and survives broken connections; a reply that is not whole is an error.

pip install httpx; python chat.py "What is the capital of France?" [http://127.0.0.1:8000]
"""

import hashlib
import json
import random
import sys
import time
import uuid

import httpx


def stream_chat(client: httpx.Client, body: dict, tries: int = 8):
    """Yields the reply's text, piece by piece. The key makes the server go on with the same reply."""
    headers = {"Idempotency-Key": uuid.uuid4().hex}
    text_hash, seal, failures = hashlib.sha256(), None, 0
    while True:
        wait = 0.0
        try:
            with client.stream(
                "POST", "/v1/chat/completions", json=body | {"stream": True}, headers=headers
            ) as answer:
                if answer.is_error:
                    message = answer.read().decode()
                    wait = float(answer.headers.get("Retry-After", 0))
                    if answer.status_code not in (408, 429, 500, 502, 503, 504) or wait > 60:
                        raise RuntimeError(message)
                    raise httpx.TransportError(message)
                rest = b""
                for data in answer.iter_bytes():  # Not lines: httpx would also split at U+2028 in a text.
                    *events, rest = (rest + data).split(b"\n\n")
                    for event in events:
                        lines = [line.partition(b": ") for line in event.split(b"\n")]
                        fields = {name: value.decode() for name, _, value in lines if name}
                        if fields.get("data") == "[DONE]":
                            if seal is None or seal["text_sha256"] != text_hash.hexdigest():
                                raise RuntimeError("the reply is not what the server says it sent")
                            return
                        if "data" not in fields:
                            continue  # A comment: the server is alive, and the reply is not there yet.
                        chunk = json.loads(fields["data"])
                        if "error" in chunk:
                            raise RuntimeError(chunk["error"]["message"])
                        seal, failures = chunk.get("glm", seal), 0
                        headers["Last-Event-ID"] = fields.get("id", "")
                        for choice in chunk["choices"]:
                            text = choice["delta"].get("content") or ""
                            text_hash.update(text.encode())
                            yield text
                raise httpx.TransportError("the stream ended without [DONE]")
        except httpx.TransportError:
            failures += 1
            if failures > tries:
                raise
            time.sleep(wait + random.uniform(0, min(0.1 * 2**failures, 5)))


if __name__ == "__main__":
    url = sys.argv[2] if len(sys.argv) > 2 else "http://127.0.0.1:8000"
    with httpx.Client(base_url=url, timeout=30) as client:
        model = client.get("/v1/models").raise_for_status().json()["data"][0]["id"]
        messages = [{"role": "user", "content": sys.argv[1]}]
        for text in stream_chat(client, {"model": model, "messages": messages}):
            print(text, end="", flush=True)
    print()
