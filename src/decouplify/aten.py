"""What the library knows about aten operators; the only file that names them.

A recorded graph holds operators at the level at which ``torch.inference_mode`` shows them to a dispatch mode: whole
``conv2d``, ``batch_norm``, ``linear``, ``scaled_dot_product_attention``, not their decompositions. An operator that is
in none of these tables is never an error: matching stops at it and its channels count as always present.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

__all__ = [
    "ACTIVATIONS",
    "AFFINE",
    "CHANNEL_LOCAL_NORMS",
    "CONV2D",
    "COUNTED",
    "HEAVY",
    "IDENTITIES",
    "LINEAR",
    "MOVES",
    "NON_NEGATIVE",
    "NORMS",
    "OTHER_CONVS",
    "PADS",
    "READS_VALUES",
    "RECTIFIERS",
    "REDUCTIONS",
    "SPATIAL",
    "ZEROS",
    "argument",
    "averages_padding",
    "conv_arguments",
    "depends_on_values",
    "has_fixed_statistics",
    "is_global_pool",
    "is_padded_view_of",
    "is_plain_add",
    "is_random",
    "is_spatial_zero_pad",
    "is_transposed",
    "is_unpadded",
    "is_zero_preserving",
    "name_of",
    "pair",
    "tensor_inputs",
    "value_of",
]

CONV2D = frozenset({"conv2d", "convolution", "_convolution"})
OTHER_CONVS = frozenset({"conv1d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"})
LINEAR = frozenset({"linear"})
#: Operators that multiply features with weights or with each other; what lies between two of them is "light".
HEAVY = CONV2D | OTHER_CONVS | LINEAR | {"matmul", "bmm", "mm", "addmm", "baddbmm", "scaled_dot_product_attention"}

#: Operators whose multiply-accumulates are counted.
COUNTED = CONV2D | OTHER_CONVS | LINEAR

#: In eval mode the output equals the (first) input.
IDENTITIES = frozenset(
    {"alias", "clone", "contiguous", "detach", "dropout", "feature_dropout", "lift_fresh", "_to_copy", "to"}
)

#: Norms whose output channel depends on its own input channel only, once the statistics are fixed.
CHANNEL_LOCAL_NORMS = frozenset({"batch_norm", "instance_norm"})
NORMS = CHANNEL_LOCAL_NORMS | {"group_norm", "layer_norm", "rms_norm"}

#: Element-wise functions of one tensor, with their value at zero (NaN: depends on the arguments).
ACTIVATIONS: dict[str, float] = {
    "relu": 0.0,
    "relu6": 0.0,
    "silu": 0.0,
    "gelu": 0.0,
    "hardswish": 0.0,
    "leaky_relu": 0.0,
    "rrelu": 0.0,
    "prelu": 0.0,
    "elu": 0.0,
    "celu": 0.0,
    "selu": 0.0,
    "mish": 0.0,
    "tanh": 0.0,
    "abs": 0.0,
    "neg": 0.0,
    "square": 0.0,
    "hardshrink": 0.0,
    "softshrink": 0.0,
    "hardtanh": math.nan,
    "clamp": math.nan,
    "clamp_min": math.nan,
    "clamp_max": math.nan,
    "sigmoid": 0.5,
    "hardsigmoid": 0.5,
    "softplus": math.log(2.0),
    "log_sigmoid": -math.log(2.0),
}
#: Activations whose output is never negative, so that a mean over positions is a mean magnitude.
NON_NEGATIVE = frozenset({"relu", "relu6", "sigmoid", "hardsigmoid", "softplus"})

#: Element-wise arithmetic that scales and shifts when the other operand is a constant.
AFFINE = frozenset({"mul", "div", "add", "sub"})

PADS = frozenset({"pad", "constant_pad_nd"})

#: Activations with slope zero at zero and below.
RECTIFIERS = frozenset({"relu", "relu6", "hardtanh", "clamp", "clamp_min"})

#: Per-channel spatial operators that turn a zero map into a zero map.
SPATIAL = frozenset(
    {
        "max_pool2d",
        "avg_pool2d",
        "adaptive_avg_pool2d",
        "adaptive_max_pool2d",
        "upsample_nearest2d",
        "upsample_bilinear2d",
        "upsample_bicubic2d",
        "_upsample_nearest_exact2d",
    }
)

#: Operators that only move elements; run on a tensor of labels they tell where each element went.
MOVES = frozenset(
    {
        "_unsafe_view",
        "cat",
        "channel_shuffle",
        "chunk",
        "concat",
        "concatenate",
        "expand",
        "expand_as",
        "flatten",
        "flip",
        "fliplr",
        "hstack",
        "index_select",
        "mT",
        "moveaxis",
        "movedim",
        "narrow",
        "native_channel_shuffle",
        "permute",
        "pixel_shuffle",
        "pixel_unshuffle",
        "ravel",
        "repeat",
        "repeat_interleave",
        "reshape",
        "reshape_as",
        "roll",
        "select",
        "slice",
        "split",
        "split_with_sizes",
        "squeeze",
        "stack",
        "swapaxes",
        "swapdims",
        "tensor_split",
        "transpose",
        "unbind",
        "unflatten",
        "unsafe_chunk",
        "unsafe_split",
        "unsqueeze",
        "view",
        "view_as",
    }
)

ZEROS = frozenset({"zeros", "zeros_like", "new_zeros"})
#: Reductions of which the result is zero where everything reduced is zero.
REDUCTIONS = frozenset({"mean", "sum", "amax", "amin"})

#: Reading values back to Python, or making as many elements as there are such values; a graph recorded from one image
#: would not hold for the next.
READS_VALUES = frozenset(
    {
        "_local_scalar_dense",
        "_unique2",
        "allclose",
        "equal",
        "is_nonzero",
        "item",
        "masked_select",
        "nms",  # of torchvision, for detection
        "nonzero",
        "unique_dim",
    }
)


def name_of(node: Node) -> str:
    """The operator's name without ``aten::`` and without the underscore of the in-place form; "" for other nodes."""
    if node.op != "call_function":
        return ""
    if node.target is operator.getitem:
        return "getitem"
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return str(getattr(node.target, "__name__", ""))
    name: str = schema.name.split("::")[1]
    return name[:-1] if name.endswith("_") and not name.startswith("__") else name


def value_of(node: Node) -> Any:
    """The example value recorded for a node: a fake tensor, or a list of them."""
    return node.meta["val"]


def tensor_inputs(node: Node) -> Iterator[Node]:
    """The nodes a node reads, in argument order, without repetition."""
    return iter(node.all_input_nodes)


def argument(node: Node, name: str, default: Any = None) -> Any:
    """An argument by its schema name, wherever the call put it."""
    if name in node.kwargs:
        return node.kwargs[name]
    schema = getattr(node.target, "_schema", None)
    names = [a.name for a in schema.arguments] if schema is not None else []
    if name not in names:
        return default
    at = names.index(name)
    if at < len(node.args):
        return node.args[at]
    declared = schema.arguments[at]  # type: ignore[union-attr]  # names is empty when schema is None
    return declared.default_value if declared.has_default_value() else default


def conv_arguments(node: Node) -> tuple[list[int], list[int] | str, list[int], int]:
    """Stride, padding, dilation and groups of a 2-D convolution node; padding may be "same" or "valid"."""
    padding = argument(node, "padding", 0)
    return (
        list(pair(argument(node, "stride", 1))),
        padding if isinstance(padding, str) else list(pair(padding)),
        list(pair(argument(node, "dilation", 1))),
        int(argument(node, "groups", 1)),
    )


def pair(value: Any) -> tuple[int, int]:
    """Rows and columns of an argument that is one number, or a sequence of one or two."""
    items = [int(v) for v in value] if isinstance(value, (list, tuple)) else [int(value)]
    return items[0], items[-1]


def is_plain_add(node: Node) -> bool:
    """Whether a node adds its two operands as they are."""
    return len(node.args) == 2 and argument(node, "alpha", 1) == 1


def is_zero_preserving(node: Node) -> bool:
    """Whether an activation node maps 0 to 0."""
    name = name_of(node)
    if name in ("hardtanh", "clamp"):
        low = argument(node, "min_val" if name == "hardtanh" else "min", None)
        high = argument(node, "max_val" if name == "hardtanh" else "max", None)
        return _at_most(low, 0.0) and _at_most(0.0, high)
    if name == "clamp_min":
        return _at_most(argument(node, "min"), 0.0)
    if name == "clamp_max":
        return _at_most(0.0, argument(node, "max"))
    return ACTIVATIONS.get(name, math.nan) == 0.0


def _at_most(low: Any, high: Any) -> bool:
    """``low <= high`` for numbers; an absent bound holds, a tensor bound is unknown and does not."""
    if low is None or high is None:
        return True
    return isinstance(low, (int, float)) and isinstance(high, (int, float)) and low <= high


def has_fixed_statistics(node: Node) -> bool:
    """Whether a batch norm maps each channel by two numbers of its own, whatever the image."""
    return argument(node, "running_mean") is not None and not argument(node, "training")


def averages_padding(node: Node) -> bool:
    """Whether a pooling node averages zeros around the map into it, so that a constant map does not stay constant."""
    if name_of(node) != "avg_pool2d" or not argument(node, "count_include_pad", True):
        return False
    padding = argument(node, "padding", 0)
    return any(padding) if isinstance(padding, (list, tuple)) else bool(padding)


def is_unpadded(node: Node) -> bool:
    """Whether a 2-D convolution node reads nothing beyond the border of its input."""
    padding = conv_arguments(node)[1]
    if isinstance(padding, str):
        kernel = value_of(node.args[1]).shape[2:]  # type: ignore[arg-type]  # a weight is a node
        return padding == "valid" or kernel.numel() == 1
    return not any(padding)


def is_padded_view_of(data: object, x: Node) -> bool:
    """Whether ``data`` is ``x``, perhaps zero-padded by the convolving module itself (TensorFlow's SAME)."""
    while isinstance(data, Node) and data is not x:
        if name_of(data) not in IDENTITIES | PADS:
            return False
        data = data.args[0]
    return data is x


def is_spatial_zero_pad(node: Node) -> bool:
    """Whether a padding node adds zeros around (N, C, H, W) maps and nothing along their channels."""
    if argument(node, "mode", "constant") != "constant" or (argument(node, "value", 0) or 0) != 0:
        return False
    return len(argument(node, "pad")) <= 4 and value_of(node).dim() == 4


def is_global_pool(node: Node) -> bool:
    """Whether a node averages (or takes the maximum of) a feature map over all of its positions."""
    name = name_of(node)
    if name in ("adaptive_avg_pool2d", "adaptive_max_pool2d"):
        return all(size == 1 for size in argument(node, "output_size"))
    if name in ("mean", "amax", "sum"):
        source = value_of(node.all_input_nodes[0])
        dims = argument(node, "dim")
        if not isinstance(source, Tensor) or source.dim() != 4 or dims is None:
            return False
        dims = [dims] if isinstance(dims, int) else dims
        return {d % 4 for d in dims} in ({2, 3}, {1, 2})
    if name in ("avg_pool2d", "max_pool2d"):
        source, result = value_of(node.all_input_nodes[0]), value_of(node)
        return source.shape[-2:].numel() > 1 and result.shape[-2:].numel() == 1
    return False


def is_transposed(node: Node) -> bool:
    """Whether a convolution node is a transposed one."""
    return "transpose" in name_of(node) or bool(argument(node, "transposed", False))


def depends_on_values(target: Any) -> bool:
    """Whether an operator tells Python about the values of its inputs, if only by the size of its result."""
    name = target._schema.name.split("::")[1]
    only_condition = name == "where" and len(target._schema.arguments) == 1
    return name in READS_VALUES or only_condition or torch.Tag.dynamic_output_shape in target.tags


def is_random(target: Any) -> bool:
    """Whether an operator draws random numbers."""
    return torch.Tag.nondeterministic_seeded in getattr(target, "tags", ())
