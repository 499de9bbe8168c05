"""A tenant with many streams and one with a single stream: that one's latency and rate beside being alone.

    .venv/bin/python tests/bench/fairness.py [--streams 64] [--requests 8] [--model DIR]

Tenants are API keys of one weight. A fair share of the tokens is half of them while both have work.
"""

import argparse
import statistics
import tempfile
import threading
import time

import openai
from serving import serve

PROMPT = "Tell a long story about a lighthouse keeper, a storm and a lost ship. Story number {}."


class Tenant:
    """One client's requests, and when their tokens came."""

    def __init__(self, url: str, key: str, max_tokens: int) -> None:
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, timeout=3600, max_retries=0)
        self.model = self.client.models.list().data[0].id
        self.max_tokens = max_tokens
        self.first, self.rates, self.tokens = [], [], 0

    def ask(self, number: int) -> None:
        """One request to its end."""
        begin, times = time.perf_counter(), []
        stream = self.client.chat.completions.create(
            model=self.model,
            messages=[{"role": "user", "content": PROMPT.format(number)}],
            max_tokens=self.max_tokens,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        for chunk in stream:
            if chunk.choices and chunk.choices[0].delta.content:
                times.append(time.perf_counter())
                self.tokens += 1
        self.first.append(times[0] - begin)
        self.rates.append((len(times) - 1) / (times[-1] - times[0]))

    def report(self) -> str:
        """Medians."""
        first, longest = (1e3 * pick(self.first) for pick in (statistics.median, max))
        rate = statistics.median(self.rates)
        return f"first token {first:7.0f} ms (longest {longest:.0f}), then {rate:6.1f} tok/s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=".models/smollm2-135m-instruct")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--requests", type=int, default=8, help="of the single stream")
    parser.add_argument("--max-tokens", type=int, default=64)
    options = parser.parse_args()
    with tempfile.NamedTemporaryFile("w", suffix=".keys") as keys:
        keys.write("many\none\n")
        keys.flush()
        arguments = ["--model", options.model, "--api-key-file", keys.name, "--speculative-tokens", "0"]
        with serve(arguments) as url:
            alone = Tenant(url, "one", options.max_tokens)
            for number in range(options.requests):
                alone.ask(number)
            print(f"alone                        {alone.report()}", flush=True)

            many, over = Tenant(url, "many", options.max_tokens), threading.Event()

            def flood(stream: int) -> None:
                number = 0
                while not over.is_set():
                    many.ask(1000 * (stream + 1) + number)
                    number += 1

            threads = [threading.Thread(target=flood, args=(stream,)) for stream in range(options.streams)]
            for thread in threads:
                thread.start()
            # Until the flood fills every place that there is.
            time.sleep(10)
            single, begin, before = Tenant(url, "one", options.max_tokens), time.perf_counter(), many.tokens
            for number in range(options.requests):
                single.ask(100 + number)
            seconds, others = time.perf_counter() - begin, many.tokens - before
            over.set()
            for thread in threads:
                thread.join()
            print(f"beside {options.streams} streams of another {single.report()}")
            print(f"each of those                {many.report()}")
            print(f"tokens/s: {single.tokens / seconds:.1f} of the one, {others / seconds:.1f} of the other")


if __name__ == "__main__":
    main()
