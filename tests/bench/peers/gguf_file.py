"""Owns the GGUF form of a checkpoint in ChatGLM3's layout, for llama.cpp's own `chatglm` architecture.

Invariant: float32 in, float32 out; llama.cpp's tool does the quantising, as for anybody.
"""

import math
from importlib import metadata
from pathlib import Path

import gguf
import numpy as np
from glm_export.default_model import PACKAGE
from glm_export.read import weights
from glm_export.read.checkpoint import Checkpoint

from . import vocabulary
from .models import Model

ARCHITECTURE = "chatglm"
TOP_LEVEL = {"embedding": "token_embd.weight", "final_norm": "output_norm.weight", "lm_head": "output.weight"}
LAYER = {
    "input_norm": "attn_norm.weight",
    "qkv": "attn_qkv.weight",
    "qkv_bias": "attn_qkv.bias",
    "dense": "attn_output.weight",
    "post_norm": "ffn_norm.weight",
    "gate_up": "ffn_up.weight",
    "down": "ffn_down.weight",
}
# The generator measures what a template adds; this one adds nothing.
CHAT_TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


def source(model: Model) -> Path:
    """The file that llama-quantize reads.

    The default model goes in as it was published, in the Llama architecture: its heads of 64 are llama.cpp's
    advantage over ChatGLM3's layout, which doubles them (and which its `chatglm` does not take: it wants
    heads as wide together as the hidden state).
    """
    if model.name == "default":
        files = metadata.distribution(PACKAGE).files or []
        return next(Path(file.locate()) for file in files if file.name.endswith(".gguf"))
    path = model.folder / "f32.gguf"
    if not path.is_file():
        temporary = path.with_suffix(".new")
        write(model, temporary)
        temporary.rename(path)
    return path


def write(model: Model, path: Path) -> None:
    """Writes the weights one tensor at a time."""
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    _add_sizes(writer, model)
    _add_vocabulary(writer, model)
    tensors = [(TOP_LEVEL[role], weight) for role, weight in weights.top_level(model.settings).items()]
    for index in range(model.settings.geometry.num_layers):
        layer = weights.layer(model.settings, index)
        tensors += [(f"blk.{index}.{LAYER[role]}", weight) for role, weight in layer.items()]
    checkpoint = Checkpoint(model.checkpoint)
    for name, weight in tensors:
        num_bytes = 4 * math.prod(weight.shape)
        writer.add_tensor_info(name, weight.shape, np.dtype("float32"), num_bytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, weight in tensors:
        writer.write_tensor_data(checkpoint[weight.source].rows())
    writer.close()


def _add_sizes(writer: gguf.GGUFWriter, model: Model) -> None:
    geometry = model.settings.geometry
    writer.add_name(model.name)
    writer.add_context_length(geometry.max_model_len)
    writer.add_embedding_length(geometry.hidden_size)
    writer.add_feed_forward_length(model.settings.ffn_size)
    writer.add_block_count(geometry.num_layers)
    writer.add_head_count(geometry.num_attention_heads)
    writer.add_head_count_kv(geometry.num_kv_heads)
    writer.add_layer_norm_rms_eps(model.settings.norm_epsilon)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_rope_dimension_count(geometry.rotary_dim)
    writer.add_rope_freq_base(model.settings.rope_base)


def _add_vocabulary(writer: gguf.GGUFWriter, model: Model) -> None:
    specials = model.settings.chat.special_tokens
    tokens, merges = vocabulary.build(min(specials.values()))
    types = [gguf.TokenType.NORMAL] * len(tokens) + [gguf.TokenType.CONTROL] * len(specials)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens + sorted(specials, key=specials.get))
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_eos_token_id(specials["<|user|>"])
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def bits_per_weight(path: Path) -> float:
    """Bits of a weight in the matrices that every token is multiplied with."""
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    # Without a matrix of its own the LM head is the embedding.
    if "output.weight" in tensors:
        del tensors["token_embd.weight"]
    matrices = [tensor for tensor in tensors.values() if len(tensor.shape) == 2]
    return 8 * sum(int(t.n_bytes) for t in matrices) / sum(int(t.n_elements) for t in matrices)
