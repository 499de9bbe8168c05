"""The loop that most scripts have: requests, decoded lines, and six characters cut off."""

import json

import requests


def _body(case, **options):
    messages = [{"role": "user", "content": case["say"]}]
    return {"model": case["model"], "messages": messages, "temperature": 0} | options


def chat(base_url, case):
    with requests.Session() as session:
        answers = [
            session.post(base_url + "/chat/completions", json=_body(case), timeout=60) for _ in range(3)
        ]
    (text,) = {answer.json()["choices"][0]["message"]["content"] for answer in answers}
    return {"text": text}


def stream(base_url, case, headers=None):
    body = _body(case, stream=True)
    text = ""
    with requests.post(
        base_url + "/chat/completions", json=body, stream=True, timeout=60, headers=headers
    ) as answer:
        for line in answer.iter_lines(decode_unicode=True):
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            for choice in json.loads(line[6:])["choices"]:
                text += choice["delta"].get("content") or ""
    return {"text": text}


silence = stream


def silence_key(base_url, case):
    return stream(base_url, case, {"Idempotency-Key": "silence"})
