"""Zhipu's own client, with the fields that it adds: temperature 0 becomes do_sample false."""

import zhipuai


def _create(base_url, case, **options):
    client = zhipuai.ZhipuAI(base_url=base_url, api_key="none.none")
    messages = [{"role": "user", "content": case["say"]}]
    return client.chat.completions.create(
        model=case["model"], messages=messages, temperature=0, user_id="user-123456", **options
    )


def chat(base_url, case):
    (text,) = {_create(base_url, case).choices[0].message.content for _ in range(3)}
    return {"text": text}


def stream(base_url, case):
    chunks = _create(base_url, case, stream=True)
    return {"text": "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)}


silence = stream
