"""Owns reading whole distributions out of a running server, one position at a time.

Invariant: the prompt goes in as token ids, so no tokenizer and no template stands between.
"""

import json
import urllib.request


def post(url: str, body: dict) -> dict:
    """The answer to a JSON request."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)
