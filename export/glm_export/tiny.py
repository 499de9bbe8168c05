"""Owns the tiny random checkpoint that tests on both sides export and run: ChatGLM3's layout, small numbers.

Invariant: the same arguments give the same files, so a test may compare across runs.
"""

from __future__ import annotations

import argparse
import io
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from glm_export import checkpoint_writer, config, weights
from glm_export.config import CHATGLM3_SPECIALS, OVERRIDES_FILE
from glm_export.error import ExportError
from glm_export.output_folder import output_folder

NAME = "tiny-random"
NUM_PIECES = 480
# Our own text, so that the shipped tokenizer is nobody else's. Repeated words give the trainer its merges.
CORPUS = (
    "The server reads a request, schedules it, runs a step and streams the answer token by token.",
    "A block holds the keys and values of sixteen tokens; a sequence owns a table of blocks.",
    "Please tell me about the weather in the city today, and whether I should take an umbrella.",
    "people love philosophy, and developers keep stepping through the code: sop, eop, and so on.",
    "What is one plus one? One plus one is two. What is two plus two? Two plus two is four.",
    "请问今天的天气怎么样？今天的天气很好，我们可以出去走走。",
    "你好，我是一个很小的模型，我的权重是随机的，所以我的回答没有意义。",
    "服务器把请求排队，然后一步一步地运行模型，并把每个词元发送给客户端。",
    'tool_call(city="Beijing", unit=\'celsius\')\n{"name": "get_weather", "parameters": {"type": "object"}}',
)


@dataclass(frozen=True)
class Shape:
    """Sizes of the network; the defaults are the smallest that exercise groups, blocks and two layers."""

    num_layers: int = 2
    hidden_size: int = 64
    num_attention_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    ffn_size: int = 128
    seq_length: int = 512
    rope_ratio: float = 1.0
    # At least the tokenizer's, which is small: more rows make a head of the real size.
    padded_vocab_size: int = 0


def write(out: Path, shape: Shape | None = None, seed: int = 0, force: bool = False) -> None:
    """Writes the checkpoint folder."""
    shape = shape or Shape()
    with output_folder(out, force, OVERRIDES_FILE) as folder:
        pieces = train_tokenizer()
        (folder / "tokenizer.model").write_bytes(pieces)
        model = sentencepiece_model_pb2.ModelProto.FromString(pieces)
        first = len(model.pieces)
        specials = {text: first + index for index, text in enumerate(CHATGLM3_SPECIALS)}
        vocab_size = first + len(specials)
        sizes = {
            "num_layers": shape.num_layers,
            "hidden_size": shape.hidden_size,
            "ffn_hidden_size": shape.ffn_size,
            "num_attention_heads": shape.num_attention_heads,
            "kv_channels": shape.head_dim,
            "multi_query_group_num": shape.num_kv_heads,
            # Rows beyond the vocabulary, as the real ones have: a server must never sample them.
            "padded_vocab_size": max(-(-(vocab_size + 1) // 64) * 64, shape.padded_vocab_size),
            "layernorm_epsilon": 1e-5,
            "rope_ratio": shape.rope_ratio,
            "seq_length": shape.seq_length,
        }
        overrides = {
            "name": NAME,
            "license": "Apache-2.0",
            "origin": f"random weights, seed {seed}",
            "vocab_size": vocab_size,
            "chat": {
                "format": "chatglm3",
                "special_tokens": specials,
                "stop_token_ids": [2, specials["<|user|>"], specials["<|observation|>"]],
            },
        }
        checkpoint_writer.write_config(folder, sizes, overrides)
        # Names and shapes of the weights follow from the config just written.
        tensors = _random_weights(config.load(folder), np.random.default_rng(seed))
        checkpoint_writer.write_weights(folder, tensors)


def train_tokenizer() -> bytes:
    """A sentencepiece model with the real one's settings and few pieces."""
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 8),
        model_writer=trained,
        model_type="bpe",
        vocab_size=NUM_PIECES,
        character_coverage=1.0,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        num_threads=1,
        minloglevel=2,
    )
    return trained.getvalue()


def _random_weights(settings: config.Config, generator: np.random.Generator) -> dict[str, np.ndarray]:
    tensors = {}
    for weight in weights.every(settings):
        noise = generator.standard_normal(weight.shape, dtype=np.float32)
        if len(weight.shape) == 1:
            # Norms scale by about 1, biases add about 0; both are visible in the result.
            tensors[weight.source] = noise * np.float32(0.1) + np.float32("norm" in weight.source)
        else:
            # Keeps the variance of what passes through, so that no layer drowns the others.
            tensors[weight.source] = noise / np.float32(np.sqrt(weight.shape[1]))
    return tensors


def main(arguments: list[str] | None = None) -> int:
    """Entry point of `python -m glm_export.tiny`."""
    parser = argparse.ArgumentParser(
        prog="glm_export.tiny", description="Write a tiny random checkpoint folder."
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    defaults = Shape()
    for size, default in vars(defaults).items():
        parser.add_argument(f"--{size.replace('_', '-')}", type=type(default), default=default)
    options = parser.parse_args(arguments)
    shape = Shape(**{size: getattr(options, size) for size in vars(defaults)})
    try:
        write(options.out, shape, options.seed, options.force)
    except (ExportError, OSError) as error:
        print(f"glm_export.tiny: {error}", file=sys.stderr)
        return 1
    print(f"{options.out}: {NAME}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
