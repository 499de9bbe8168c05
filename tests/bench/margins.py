"""How far each example is from a near-tie: the smallest margin between the two best logits, in float32.

    GLMSERVE_ORT_LIB=... .venv/bin/python tests/bench/margins.py [--served FOLDER] ["Another question?" ...]

Exports the default model in float32 (1.5 GB for a while, a minute), lets it answer greedily, and says whether
the served folder answers alike, and how far apart the two best logits were where they were closest.
"""

import argparse
import json
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openai
from examples import EXAMPLES, LEAST_MARGIN, Example
from glm_export import cli, default_model
from serving import serve
from tokenizers import Tokenizer


class Model:
    """A folder, and what is needed to talk to it in tokens."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = json.loads((folder / "manifest.json").read_text())
        self.tokenizer = Tokenizer.from_file(str(folder / self.manifest["tokenizer"]["file"]))

    def prompt(self, question: str) -> list[int]:
        """ChatML, as the server writes it."""
        chat = self.manifest["chat"]
        start, end = (chat["special_tokens"][text] for text in ("<|im_start|>", "<|im_end|>"))
        ids = []
        for role, text in (("system", chat["default_system"]), ("user", question)):
            ids += [start, *self.encode(f"{role}\n{text}"), end, *self.encode("\n")]
        return [*ids, start, *self.encode("assistant\n")]

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def answers(self, examples: list[Example]) -> Iterator[openai.types.chat.ChatCompletion]:
        """What a server of the folder says to each example."""
        with serve(["--model", str(self.folder)]) as url:
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=600)
            for example in examples:
                yield client.chat.completions.create(
                    model=self.manifest["model"]["name"],
                    messages=[{"role": "user", "content": example.question}],
                    temperature=0,
                    max_tokens=example.max_tokens,
                )

    def logits(self, ids: list[int], out: Path) -> np.ndarray:
        """Those of each position."""
        options = ["--model", self.folder, "--ids", ",".join(map(str, ids)), "--out", out]
        subprocess.run(["target/release/glmserve", "logits", *options], check=True, stdout=subprocess.DEVNULL)
        return np.load(out)[:, : self.manifest["geometry"]["vocab_size"]]


def margins(
    model: Model, answer: openai.types.chat.ChatCompletion, prompt: list[int], out: Path
) -> np.ndarray:
    """Of each token that was drawn for the answer, how far its logit is above the next best."""
    choice, usage = answer.choices[0], answer.usage
    reply = model.encode(choice.message.content)
    assert usage.prompt_tokens == len(prompt), "the prompt is not as the server writes it"
    # One row more than the reply if its end was drawn too.
    num_drawn = len(reply) + (choice.finish_reason == "stop")
    rows = model.logits(prompt + reply, out)[len(prompt) - 1 :][:num_drawn]
    second, best = np.partition(rows, -2, axis=1)[:, -2:].T
    # A text may be cut into other tokens than it was drawn in, and then says nothing of those.
    drawn = list(rows.argmax(axis=1))
    if drawn[: len(reply)] != reply:
        raise ValueError(f"its tokens are {drawn}, and those of its text are {reply}")
    return best - second


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("questions", nargs="*", metavar="QUESTION", help="more of them")
    parser.add_argument("--served", type=Path, default=".models/smollm2-135m-instruct", metavar="FOLDER")
    parser.add_argument("--max-tokens", type=int, default=40, help="of the further questions (%(default)s)")
    options = parser.parse_args()
    examples = [*EXAMPLES, *(Example(question, options.max_tokens, "") for question in options.questions)]
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, exact = Path(folder) / "checkpoint", Path(folder) / "exact"
        default_model.write(checkpoint)
        cli.export(checkpoint, exact, "fp32")
        model = Model(exact)
        wanted = list(model.answers(examples))
        served = list(Model(options.served).answers(examples))
        print("| question | tokens | smallest margin | before the token | served answer |")
        print("|---|---|---|---|---|")
        smallest = np.inf
        for example, want, found in zip(examples, wanted, served, strict=True):
            prompt = model.prompt(example.question)
            try:
                steps = margins(model, want, prompt, Path(folder) / "logits.npy")
            except ValueError as error:
                if example in EXAMPLES:
                    raise
                print(f"| {example.question} | {error} | | | |", flush=True)
                continue
            at = int(np.argmin(steps))
            texts = [answer.choices[0].message.content for answer in (want, found)]
            verdict = "the same" if texts[0] == texts[1] else f"differs: {texts[1]!r} for {texts[0]!r}"
            if example.word not in texts[1]:
                verdict += f", without {example.word!r}"
            print(f"| {example.question} | {len(steps)} | {steps[at]:.2f} | {at} | {verdict} |", flush=True)
            if example in EXAMPLES:
                smallest = min(smallest, steps[at])
    if smallest < LEAST_MARGIN:
        raise SystemExit(f"the smallest margin is {smallest:.2f}, and {LEAST_MARGIN} is the least")


if __name__ == "__main__":
    main()
