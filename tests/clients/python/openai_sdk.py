"""The official client, at its defaults."""

import openai


def _client(base_url, **options):
    return openai.OpenAI(base_url=base_url, api_key="none", **options)


def _request(case, **options):
    messages = [{"role": "user", "content": case["say"]}]
    return {"model": case["model"], "messages": messages, "temperature": 0} | options


def _text(chunks):
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)


def chat(base_url, case):
    client = _client(base_url)
    answers = [client.chat.completions.create(**_request(case)) for _ in range(3)]
    (text,) = {answer.choices[0].message.content for answer in answers}
    return {"text": text}


def stream(base_url, case, **options):
    return {
        "text": _text(_client(base_url).chat.completions.create(stream=True, **_request(case), **options))
    }


def usage(base_url, case):
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(_client(base_url).chat.completions.create(**_request(case), **options))
    return {"text": _text(chunks), "completion_tokens": chunks[-1].usage.completion_tokens}


async def async_stream(base_url, case):
    client = openai.AsyncOpenAI(base_url=base_url, api_key="none")
    chunks = await client.chat.completions.create(stream=True, **_request(case))
    return {"text": _text([chunk async for chunk in chunks])}


silence = stream


def silence_key(base_url, case):
    return stream(base_url, case, extra_headers={"Idempotency-Key": "silence"})


def retry(base_url, case):
    client = _client(base_url, timeout=0.3, max_retries=9)
    answer = client.chat.completions.create(**_request(case), extra_headers={"Idempotency-Key": "retry"})
    return {"text": answer.choices[0].message.content}


def models(base_url, case):
    return {"model": next(iter(_client(base_url).models.list())).id}


def overflow(base_url, case):
    try:
        _client(base_url).chat.completions.create(**_request({**case, "say": "x" * 20_000}))
    except openai.BadRequestError as error:
        return {"is_recognised": error.code == "context_length_exceeded"}
    return {"is_recognised": False}


def refusal(base_url, case):
    try:
        _client(base_url).chat.completions.create(**_request(case), extra_body={"temprature": 1})
    except openai.BadRequestError as error:
        return {"is_named": error.param == "temprature"}
    return {"is_named": False}
