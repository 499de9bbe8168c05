"""Owns running an exported graph without the engine: ONNX Runtime's CPU kernels, and attention in numpy.

The CPU provider has no PagedAttention, so the graph is cut at those nodes: each piece between two of them is
a session of its own, and a plain reference runs at the cuts. Only that node is not the real thing.
"""

from dataclasses import dataclass, field

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper


@dataclass
class Batch:
    """One step: for each sequence its new tokens, how many are cached, and its blocks."""

    block_size: int
    sequences: list = field(default_factory=list)
    wanted: list = field(default_factory=list)

    def add(self, tokens, past, blocks, wanted="last"):
        """Adds a sequence's share; `wanted` is which of its tokens' logits to return: last, all or none."""
        start = sum(len(tokens) for tokens, _, _ in self.sequences)
        self.sequences.append((tokens, past, blocks))
        rows = range(start, start + len(tokens))
        self.wanted += {"last": rows[-1:], "all": rows, "none": []}[wanted]
        return self

    def feeds(self):
        """The graph's int32 inputs."""
        width = max(len(blocks) for _, _, blocks in self.sequences)
        lengths = [len(tokens) for tokens, _, _ in self.sequences]
        contexts = [past + len(tokens) for tokens, past, _ in self.sequences]
        slots = [
            blocks[position // self.block_size] * self.block_size + position % self.block_size
            for tokens, past, blocks in self.sequences
            for position in range(past, past + len(tokens))
        ]
        arrays = {
            "token_ids": [token for tokens, _, _ in self.sequences for token in tokens],
            "cumulative_sequence_length": np.cumsum([0, *lengths]),
            "past_seqlens": [past for _, past, _ in self.sequences],
            "block_table": [blocks + [0] * (width - len(blocks)) for _, _, blocks in self.sequences],
            "slot_mapping": slots,
            "attention_metadata": [max(lengths), max(contexts), min(contexts)],
            "logits_indices": self.wanted,
        }
        return {name: np.array(values, np.int32) for name, values in arrays.items()}


class PagedSession:
    """An exported folder, its caches and its pieces."""

    def __init__(self, folder, num_blocks, threads=1):
        model = onnx.load(folder / "model.onnx")
        self._constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self.caches = {
            value.name: np.full([num_blocks, *_dims(value)[1:]], np.nan, np.float32)
            for value in model.graph.input
            if "_cache." in value.name
        }
        self._pieces = []
        self._attention = []
        nodes = []
        for node in model.graph.node:
            if node.op_type == "PagedAttention":
                self._attention.append(node)
                self._pieces.append(nodes)
                nodes = []
            else:
                nodes.append(node)
        self._pieces.append(nodes)
        produced_by = [{name for node in piece for name in node.output if name} for piece in self._pieces]
        self._sessions = []
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        int32 = {
            value.name for value in model.graph.input if value.type.tensor_type.elem_type == TensorProto.INT32
        }
        outputs = {value.name: value.type.tensor_type.elem_type for value in model.graph.output}
        for index, piece in enumerate(self._pieces):
            used = {name for node in piece for name in node.input if name}
            outside = sorted(used - produced_by[index] - initializers.keys())
            later = {name for after in self._pieces[index + 1 :] for node in after for name in node.input}
            later |= {node.input[0] for node in self._attention} | outputs.keys()
            graph = helper.make_graph(
                piece,
                f"piece{index}",
                [_value(name, TensorProto.INT32 if name in int32 else TensorProto.FLOAT) for name in outside],
                [
                    _value(name, outputs.get(name, TensorProto.FLOAT))
                    for name in sorted(produced_by[index] & later)
                ],
                [initializers[name] for name in sorted(used & initializers.keys())],
            )
            part = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
            self._sessions.append(
                onnxruntime.InferenceSession(
                    part.SerializeToString(), options, providers=["CPUExecutionProvider"]
                )
            )

    def run(self, batch):
        """Runs a step, updates the caches, returns the logits of the wanted rows."""
        return self.run_all(batch)["logits"]

    def run_all(self, batch):
        """As `run`, and returns every value of the graph by name."""
        values = batch.feeds()
        for index, session in enumerate(self._sessions):
            wanted = [value.name for value in session.get_outputs()]
            feeds = {value.name: values[value.name] for value in session.get_inputs()}
            values |= zip(wanted, session.run(wanted, feeds), strict=True)
            if index < len(self._attention):
                node = self._attention[index]
                values[node.output[0]] = self._paged_attention(node, values)
        return values

    def _paged_attention(self, node, values):
        attributes = {item.name: helper.get_attribute_value(item) for item in node.attribute}
        assert attributes["do_rotary"] == attributes["rotary_interleaved"] == 1
        assert [bool(name) for name in node.input] == [bool(bit) for bit in map(int, "10011111111000001")]
        keys, values_cache = self.caches[node.input[3]], self.caches[node.input[4]]
        heads, groups = attributes["num_heads"], attributes["kv_num_heads"]
        _, block_size, _, width = keys.shape
        qkv = values[node.input[0]].reshape(-1, heads + 2 * groups, width)
        cos, sin = self._constants[node.input[8]], self._constants[node.input[9]]
        starts, pasts, table = (values[node.input[position]] for position in (5, 6, 7))
        slots = values[node.input[10]]
        out = np.empty((len(qkv), heads, width), np.float32)
        for row, past in enumerate(pasts):
            own = slice(starts[row], starts[row + 1])
            count = own.stop - own.start
            positions = np.arange(past, past + count)
            rotated = _rotate(qkv[own, : heads + groups], cos[positions], sin[positions])
            keys.reshape(-1, groups, width)[slots[own]] = rotated[:, heads:]
            values_cache.reshape(-1, groups, width)[slots[own]] = qkv[own, heads + groups :]
            context = np.arange(past + count)
            flat = table[row][context // block_size] * block_size + context % block_size
            k, v = (cache.reshape(-1, groups, width)[flat] for cache in (keys, values_cache))
            k, v = (np.repeat(part, heads // groups, axis=1) for part in (k, v))
            scores = np.einsum("qhd,khd->hqk", rotated[:, :heads], k) * attributes["scale"]
            scores = np.where(context[None, None] <= positions[None, :, None], scores, -np.inf)
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            weights /= weights.sum(axis=-1, keepdims=True)
            out[own] = np.einsum("hqk,khd->qhd", weights, v)
        return out.reshape(len(qkv), -1)


def _rotate(heads, cos, sin):
    """Interleaved pairs of the first channels; the others pass."""
    rotated = heads.copy()
    even, odd = heads[..., 0 : 2 * cos.shape[1] : 2], heads[..., 1 : 2 * cos.shape[1] : 2]
    rotated[..., 0 : 2 * cos.shape[1] : 2] = even * cos[:, None] - odd * sin[:, None]
    rotated[..., 1 : 2 * cos.shape[1] : 2] = odd * cos[:, None] + even * sin[:, None]
    return rotated


def _dims(value):
    return [dim.dim_value for dim in value.type.tensor_type.shape.dim]


def _value(name, item_type):
    return helper.make_tensor_value_info(name, item_type, None)
