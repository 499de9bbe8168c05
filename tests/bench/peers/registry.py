"""Owns the list of contenders by name, and who is left out for what reason."""

from .contender import Contender
from .glmserve import Glmserve
from .llama_cpp import LlamaCpp
from .vllm_cpu import VllmCpu

OURS = {
    "glmserve-int4": lambda: Glmserve("int4", 128),
    "glmserve-int4-b32": lambda: Glmserve("int4", 32),
    "glmserve-int8": lambda: Glmserve("int8", 512),
    "glmserve-int8-b128": lambda: Glmserve("int8", 128),
    "glmserve-int8-b64": lambda: Glmserve("int8", 64),
}
PEERS = {
    "llama-q4_0": lambda: LlamaCpp("Q4_0"),
    "llama-q4_1": lambda: LlamaCpp("Q4_1"),
    "llama-q8_0": lambda: LlamaCpp("Q8_0"),
    "vllm-w8a8": VllmCpu,
}
ALL = OURS | PEERS
DEFAULT = ("glmserve-int4", "llama-q4_0", "glmserve-int8", "llama-q8_0", "vllm-w8a8")
LEFT_OUT = {
    "onnxruntime-genai": "its batching engine is unproven on CPUs, its generator takes one request a time",
    "transformers": "one request at a time, as the old server did",
}


def contenders(names: list[str]) -> list[Contender]:
    """Contenders in the order of their names."""
    return [ALL[name]() for name in names]


def is_ours(contender_name: str) -> bool:
    """Whether a row of the table is this project's."""
    return contender_name.startswith("glmserve")
