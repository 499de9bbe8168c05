"""Greedy output of twelve prompts sent together against each sent alone: how many differ.

    make serve &                      # or any OpenAI-compatible server
    .venv/bin/python tests/bench/flips.py [--url http://127.0.0.1:8000] [--max-tokens 128]

A server whose rows do not depend on their batch prints 0.
"""

import argparse
import itertools
from concurrent.futures import ThreadPoolExecutor

import openai

PROMPTS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain photosynthesis to a child.",
    "List five prime numbers and say why they are prime.",
    "Who wrote Hamlet, and when?",
    "Give me a recipe for pancakes.",
    "What is the difference between TCP and UDP?",
    "Tell a short story about a lighthouse keeper.",
    "How do vaccines work?",
    "Translate 'good morning' into Spanish, French and German.",
    "What causes the seasons?",
    "Write a Python function that reverses a string.",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--max-tokens", type=int, default=128)
    options = parser.parse_args()
    client = openai.OpenAI(base_url=options.url + "/v1", api_key="none", timeout=600)
    model = client.models.list().data[0].id

    def ask(prompt: str) -> str:
        messages = [{"role": "user", "content": prompt}]
        answer = client.chat.completions.create(
            model=model, messages=messages, temperature=0, max_tokens=options.max_tokens
        )
        return answer.choices[0].message.content

    alone = [ask(prompt) for prompt in PROMPTS]
    again = [ask(prompt) for prompt in PROMPTS]
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        together = list(pool.map(ask, PROMPTS))
    for prompt, first, second in zip(PROMPTS, alone, together, strict=True):
        if first != second:
            same = sum(
                1
                for _ in itertools.takewhile(
                    lambda pair: pair[0] == pair[1], zip(first, second, strict=False)
                )
            )
            print(f"differs from character {same} of {len(first)}: {prompt}")
    num_repeat = sum(a != b for a, b in zip(alone, again, strict=True))
    num_flips = sum(a != b for a, b in zip(alone, together, strict=True))
    print(f"alone twice: {num_repeat} of {len(PROMPTS)} differ")
    print(f"alone and together: {num_flips} of {len(PROMPTS)} differ")


if __name__ == "__main__":
    main()
