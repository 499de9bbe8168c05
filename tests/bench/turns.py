"""A chat's second turn: its time to the first token beside the first turn's, and what the prefix cache gave.

    .venv/bin/python tests/bench/turns.py [--prompt-tokens 1000] [--chats 9] [--model DIR]

Each chat is new to the server. The first turn asks about a text of so many tokens; the second sends the same
text, the reply and a further question. Medians; the hit rate is that of the server's own counters.
"""

import argparse
import random
import statistics
import time

import openai
from serving import counter, serve

WORDS = ["river", "stone", "lantern", "harvest", "copper", "window", "garden", "thunder", "paper", "silver"]


def first_token_s(client: openai.OpenAI, model: str, messages: list[dict]) -> tuple[float, str, object]:
    """Seconds to the first token, the reply, and the usage."""
    begin, first, text, usage = time.perf_counter(), None, "", None
    stream = client.chat.completions.create(
        model=model,
        messages=messages,
        temperature=0,
        max_tokens=32,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            first = first or time.perf_counter() - begin
            text += chunk.choices[0].delta.content
        usage = chunk.usage or usage
    return first, text, usage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=".models/smollm2-135m-instruct")
    parser.add_argument("--prompt-tokens", type=int, default=1000, help="about; a word is about one")
    parser.add_argument("--chats", type=int, default=9)
    options = parser.parse_args()
    rows = []
    with serve(["--model", options.model, "--speculative-tokens", "0"]) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=600)
        model = client.models.list().data[0].id
        names = ["glmserve_prefix_cache_queries_total", "glmserve_prefix_cache_hits_total"]
        before = [counter(url, name) for name in names]
        for chat in range(options.chats):
            rng = random.Random(chat)
            text = " ".join(rng.choice(WORDS) for _ in range(options.prompt_tokens))
            messages = [{"role": "user", "content": f"{text}\nWhich word is the first?"}]
            first, reply, usage = first_token_s(client, model, messages)
            messages += [
                {"role": "assistant", "content": reply},
                {"role": "user", "content": "And which is the second?"},
            ]
            second, _, usage_2 = first_token_s(client, model, messages)
            cached = usage_2.prompt_tokens_details.cached_tokens
            rows.append((first, second, usage.prompt_tokens, usage_2.prompt_tokens, cached))
        queries, hits = (counter(url, name) - old for name, old in zip(names, before, strict=True))
    medians = [statistics.median(column) for column in zip(*rows, strict=True)]
    first, second, tokens, tokens_2, cached = medians
    print(f"first turn   {tokens:.0f} tokens, first token after {1e3 * first:.0f} ms")
    print(f"second turn  {tokens_2:.0f} tokens, {cached:.0f} of them cached, after {1e3 * second:.0f} ms")
    print(f"ratio        {second / first:.3f}")
    print(f"hit rate     {hits / queries:.3f} of all prompt tokens, from /metrics")


if __name__ == "__main__":
    main()
