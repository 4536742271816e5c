"""The dense network that every baseline runs: one recorded graph, batch norms folded into convolutions.

All runtimes get the same graph, so none of them wins or loses by how a network happens to be written, and eager PyTorch
is not handicapped by norms that other runtimes fold by themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.nn.utils.fusion import fuse_conv_bn_weights

from decouplify import aten
from decouplify.trace import Trace

__all__ = ["dense_module"]


@torch.no_grad()
def dense_module(trace: Trace) -> GraphModule:
    """A recorded run as a module of plain torch operators, without gates.

    Args:
        trace: The run of an unwrapped model in eval mode. Tensors that need no folding are shared with it.

    Returns:
        A module that takes images of the recorded size.
    """
    return _Rebuilding(trace).run()


class _Rebuilding:
    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.root = nn.Module()
        self.graph = Graph()
        self.new: dict[Node, Node] = {}

    def run(self) -> GraphModule:
        for node in self.trace.graph.nodes:
            if node in self.new or node.op == "get_attr":
                continue
            norm = _norm_to_fold(node)
            if norm is None:
                self.new[node] = self.graph.node_copy(node, self._lookup)
            else:
                self.new[norm] = self._fold(node, norm)
        self.graph.lint()
        return GraphModule(self.root, self.graph, "Dense").eval()

    def _lookup(self, node: Node) -> Node:
        if node not in self.new:  # a tensor, placed where it is first used
            self.new[node] = self._tensor(self.trace.tensors[str(node.target)])
        return self.new[node]

    def _fold(self, conv: Node, norm: Node) -> Node:
        weight, bias = (self._tensor_of(conv, name) for name in ("weight", "bias"))
        mean, var, gamma, beta = (
            self._tensor_of(norm, name) for name in ("running_mean", "running_var", "weight", "bias")
        )
        eps = float(aten.argument(norm, "eps"))
        folded = fuse_conv_bn_weights(weight, bias, mean, var, eps, gamma, beta)  # type: ignore[arg-type]  # takes None
        data = self._lookup(conv.args[0])  # type: ignore[arg-type]  # a node
        tensors = [self._tensor(t) for t in folded]
        return self.graph.call_function(conv.target, (data, *tensors, *conv.args[3:]), conv.kwargs)  # type: ignore[arg-type]  # an operator

    def _tensor_of(self, node: Node, name: str) -> Tensor | None:
        source = aten.argument(node, name)
        return None if source is None else self.trace.tensors[str(source.target)]

    def _tensor(self, value: Tensor) -> Node:
        name = f"tensor{len(self.root._buffers)}"
        self.root.register_buffer(name, value.detach())
        return self.graph.create_node("get_attr", name)


def _norm_to_fold(conv: Node) -> Node | None:
    """The batch norm that alone reads a convolution, where all their tensors are the network's own."""
    if aten.name_of(conv) not in aten.CONV2D or aten.is_transposed(conv) or len(conv.users) != 1 or conv.kwargs:
        return None
    norm = next(iter(conv.users))
    is_norm = aten.name_of(norm) == "batch_norm" and not aten.argument(norm, "training")
    if not is_norm or aten.argument(norm, "running_mean") is None:
        return None
    tensors = (*conv.all_input_nodes[1:], *norm.all_input_nodes[1:])
    return norm if all(node.op == "get_attr" for node in tensors) else None
