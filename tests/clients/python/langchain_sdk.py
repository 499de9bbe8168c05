"""LangChain's class for servers that speak OpenAI's protocol."""

import langchain_openai


def _model(base_url, case, **options):
    return langchain_openai.ChatOpenAI(
        base_url=base_url, api_key="none", model=case["model"], temperature=0, **options
    )


def chat(base_url, case):
    model = _model(base_url, case)
    (text,) = {model.invoke(case["say"]).text for _ in range(3)}
    return {"text": str(text)}


def stream(base_url, case):
    return {"text": "".join(str(chunk.text) for chunk in _model(base_url, case).stream(case["say"]))}


def usage(base_url, case):
    whole = None
    for chunk in _model(base_url, case, stream_usage=True).stream(case["say"]):
        whole = chunk if whole is None else whole + chunk
    return {"text": str(whole.text), "completion_tokens": whole.usage_metadata["output_tokens"]}


async def async_stream(base_url, case):
    chunks = [chunk async for chunk in _model(base_url, case).astream(case["say"])]
    return {"text": "".join(str(chunk.text) for chunk in chunks)}


silence = stream


def overflow(base_url, case):
    try:
        _model(base_url, case).invoke("x" * 20_000)
    except Exception as error:
        names = [kind.__name__ for kind in type(error).__mro__]
        return {"is_recognised": "ContextOverflowError" in names}
    return {"is_recognised": False}
