"""Owns the questions at temperature 0 whose answers by the default model stand in README.md or in a test.

Invariant: none stands on a near-tie; `margins.py` prints how far each is from one. Who changes a question
changes its answer where it stands.
"""

from dataclasses import dataclass

# The two best logits of each token are at least so far apart in float32; int8 moves a logit by about 0.1.
LEAST_MARGIN = 0.5


@dataclass(frozen=True)
class Example:
    """A question to the default model."""

    question: str
    max_tokens: int
    # A word that the answer has.
    word: str


# README's first, and the end-to-end tests'.
CAPITAL = Example("What is the capital of Japan?", 30, "Tokyo")
# README's stream.
COUNT = Example("Count from 1 to 10.", 60, "10. 10")

EXAMPLES = (CAPITAL, COUNT)
