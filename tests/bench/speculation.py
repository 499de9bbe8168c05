"""Greedy replies with draft tokens and without: tokens a second, drafts, and how many replies differ.

    .venv/bin/python tests/bench/speculation.py [--rounds 5] [--streams 1] [--max-tokens 160] [--serve ...]

Two servers of the default model take turns; figures are the best of the rounds. A reply differs only where
the runtime's product of a row depends on how many rows are beside it.
"""

import argparse
import time
from concurrent.futures import ThreadPoolExecutor

import openai
from serving import counter, serve

TEXT = (
    "The lighthouse stood on a narrow rock two miles from the harbour. Every evening the keeper climbed the "
    "one hundred and twelve steps, trimmed the wick, wound the clockwork and wrote the state of the sea in "
    "his book. In winter the supply boat could not land for weeks, and he lived on dried fish and biscuits."
)
CODE = """class Point:
    def __init__(self, x, y):
        self.x = x
        self.y = y

    def add(self, other):
        return Point(self.x + other.x, self.y + other.y)

    def scale(self, factor):
        return Point(self.x * factor, self.y * factor)
"""
PROMPTS = {
    "repeats": [
        f"Repeat this text exactly, word for word:\n\n{TEXT}",
        f"Write this Python class again and add a method `subtract`:\n\n{CODE}",
        f"Correct spelling mistakes in this text and print it:\n\n{TEXT}",
    ],
    "does not": [
        "Write a haiku about the sea.",
        "Explain photosynthesis to a child.",
        "Tell a short story about a lighthouse keeper.",
    ],
}


def counts(url: str) -> list[int]:
    """Draft tokens, and those of them that were accepted."""
    names = ["glmserve_draft_tokens_total", "glmserve_accepted_draft_tokens_total"]
    return [counter(url, name) for name in names]


class Bench:
    """Replies of one server to one prompt."""

    def __init__(self, url: str, options: argparse.Namespace) -> None:
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=600)
        self.model = self.client.models.list().data[0].id
        self.options = options
        self.text = ""

    def ask(self, prompt: str) -> tuple[str, int, float]:
        """The reply, its tokens after the first, and the seconds that those took."""
        stream = self.client.chat.completions.create(
            model=self.model,
            messages=[{"role": "user", "content": prompt}],
            temperature=0,
            max_tokens=self.options.max_tokens,
            stream=True,
            stream_options={"include_usage": True},
        )
        text, first, num_tokens = "", None, 0
        for chunk in stream:
            if chunk.choices and chunk.choices[0].delta.content:
                first = first or time.perf_counter()
                text += chunk.choices[0].delta.content
            if chunk.usage:
                num_tokens = chunk.usage.completion_tokens
        return text, num_tokens - 1, time.perf_counter() - first

    def speed(self, prompt: str) -> float:
        """Tokens a second of all streams."""
        with ThreadPoolExecutor(self.options.streams) as pool:
            replies = list(pool.map(self.ask, [prompt] * self.options.streams))
        self.text = replies[0][0]
        return sum(tokens / seconds for _, tokens, seconds in replies)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=".models/smollm2-135m-instruct")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streams", type=int, default=1)
    parser.add_argument("--max-tokens", type=int, default=160)
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=[], help="options of both servers")
    options = parser.parse_args()
    common = ["--model", options.model, *options.serve]
    with serve([*common, "--speculative-tokens", "0"]) as off, serve(common) as on:
        plain, guessing = Bench(off, options), Bench(on, options)
        print("prompt    tok/s off      on   ratio   drafted  right  same reply")
        for kind, prompts in PROMPTS.items():
            for prompt in prompts:
                before = counts(on)
                rounds = [(plain.speed(prompt), guessing.speed(prompt)) for _ in range(options.rounds)]
                slow, fast = (max(speeds) for speeds in zip(*rounds, strict=True))
                drafted, right = (b - a for a, b in zip(before, counts(on), strict=True))
                same = plain.text == guessing.text
                print(
                    f"{kind:9} {slow:9.1f} {fast:7.1f} {fast / slow:7.2f} {drafted:9} {right:6}  {same}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
