"""Owns what the engine's operators take in besides a product: the nodes between two attentions as one
PostAttention, the first norm as an input of the product after it; and such nodes as what they were made of.

So no sum of floats is left to ONNX Runtime, whose order depends on the processor.

Invariant: what a fused node computes is what it is expanded to, and weights keep their names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from onnx import NodeProto, helper

OWN = "glmserve"
MICROSOFT = "com.microsoft"
KIND = "PostAttention"
PRODUCT = "QuantizedMatMul"
# Inputs of a product: rows, weights, bias, norm.
NORM_INPUT = 3
# Of the layer: its products and norms in order; the last two are the next layer's, or the head.
PRODUCTS = ("dense", "gate_up", "down", "next")
KINDS = (
    PRODUCT,
    "SkipSimplifiedLayerNormalization",
    PRODUCT,
    PRODUCT,
    "SkipSimplifiedLayerNormalization",
    PRODUCT,
)


def fused(nodes: Sequence[NodeProto]) -> Iterator[NodeProto]:
    """The nodes, in their order, with one in place of each six that lie between two attentions, and of a norm
    and the product that alone reads it.
    """
    first = 0
    while first < len(nodes):
        if node := _fuse(nodes[first : first + len(KINDS)]):
            yield node
            first += len(KINDS)
        elif node := _fuse_norm(nodes, first):
            yield node
            first += 2
        else:
            yield nodes[first]
            first += 1


def expanded(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    """The nodes, with what a fused one stands for in its place."""
    for node in nodes:
        if node.op_type == KIND:
            yield from _parts(node)
        elif node.op_type == PRODUCT and len(node.input) > NORM_INPUT:
            yield from _norm_and_product(node)
        else:
            yield node


def _fuse_norm(nodes: Sequence[NodeProto], first: int) -> NodeProto | None:
    if first + 1 >= len(nodes):
        return None
    norm, product = nodes[first : first + 2]
    is_pair = (
        (norm.op_type, product.op_type) == ("SimplifiedLayerNormalization", PRODUCT)
        and product.input[0] == norm.output[0]
        and sum(list(node.input).count(norm.output[0]) for node in nodes) == 1
    )
    if not is_pair:
        return None
    rows, scale = norm.input
    _, *weights = product.input
    return helper.make_node(
        PRODUCT,
        [rows, *weights, *[""] * (NORM_INPUT - 1 - len(weights)), scale],
        product.output,
        product.name,
        domain=OWN,
        **_attributes(product),
        epsilon=_attributes(norm)["epsilon"],
    )


def _norm_and_product(node: NodeProto) -> list[NodeProto]:
    attributes = _attributes(node)
    epsilon = attributes.pop("epsilon")
    rows, weight, bias, scale = node.input
    name = _value(scale)
    return [
        helper.make_node(
            "SimplifiedLayerNormalization", [rows, scale], [name], name, axis=-1, epsilon=epsilon
        ),
        helper.make_node(
            PRODUCT, [name, weight, *filter(None, [bias])], node.output, node.name, domain=OWN, **attributes
        ),
    ]


def _fuse(nodes: Sequence[NodeProto]) -> NodeProto | None:
    if tuple(node.op_type for node in nodes) != KINDS:
        return None
    dense, post_norm, gate_up, down, next_norm, following = nodes
    products = dict(zip(PRODUCTS, map(_attributes, (dense, gate_up, down, following)), strict=True))
    epsilons = {_attributes(norm)["epsilon"] for norm in (post_norm, next_norm)}
    is_chain = (
        post_norm.input[0] == dense.output[0]
        and gate_up.input[0] == post_norm.output[0]
        and down.input[0] == gate_up.output[0]
        and list(next_norm.input[:2]) == [down.output[0], post_norm.output[3]]
        and following.input[0] == next_norm.output[0]
        and [product["epilogue"] for product in products.values()] == [b"none", b"swiglu", b"none", b"none"]
        and len({product["bits"] for product in products.values()}) == len(epsilons) == 1
        and all(len(product.input) == 2 for product in (dense, gate_up, down))
    )
    if not is_chain:
        return None
    return helper.make_node(
        KIND,
        [
            dense.input[0],
            post_norm.input[1],
            dense.input[1],
            post_norm.input[2],
            gate_up.input[1],
            down.input[1],
            next_norm.input[2],
            *following.input[1:],
        ],
        [following.output[0], next_norm.output[3]],
        f"{dense.name}.post_attention",
        domain=OWN,
        K=products["dense"]["K"],
        hidden=products["dense"]["N"],
        ffn=products["down"]["K"],
        N=products["next"]["N"],
        bits=products["dense"]["bits"],
        epsilon=epsilons.pop(),
        **{f"{name}_block_size": product["block_size"] for name, product in products.items()},
    )


def _parts(node: NodeProto) -> list[NodeProto]:
    """The six nodes; names of values between them are made of the weights'."""
    attributes = _attributes(node)
    attention, residual, dense, post_norm, gate_up, down, next_norm, *following = node.input
    hidden, ffn = attributes["hidden"], attributes["ffn"]

    def product(
        role: str, rows: str, weights: list[str], width: int, num_rows: int, output: str
    ) -> NodeProto:
        return helper.make_node(
            PRODUCT,
            [rows, *weights],
            [output],
            output,
            domain=OWN,
            K=width,
            N=num_rows,
            bits=attributes["bits"],
            block_size=attributes[f"{role}_block_size"],
            epilogue="swiglu" if role == "gate_up" else "none",
        )

    def norm(update: str, before: str, scale: str, total: str) -> NodeProto:
        name = _value(scale)
        return helper.make_node(
            "SkipSimplifiedLayerNormalization",
            [update, before, scale],
            [name, "", "", total],
            name,
            domain=MICROSOFT,
            epsilon=attributes["epsilon"],
        )

    middle = f"{_value(post_norm)}.residual"
    return [
        product("dense", attention, [dense], attributes["K"], hidden, _value(dense)),
        norm(_value(dense), residual, post_norm, middle),
        product("gate_up", _value(post_norm), [gate_up], hidden, 2 * ffn, _value(gate_up)),
        product("down", _value(gate_up), [down], ffn, hidden, _value(down)),
        norm(_value(down), middle, next_norm, node.output[1]),
        product("next", _value(next_norm), following, hidden, attributes["N"], node.output[0]),
    ]


def _value(weight: str) -> str:
    """What a weight's product or norm gives."""
    return weight.removesuffix(".weight")


def _attributes(node: NodeProto) -> dict[str, int | float | bytes]:
    return {item.name: helper.get_attribute_value(item) for item in node.attribute}
