"""``sparsify``: a wrapped model as a module for inference on a CPU that computes only what each image's path needs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Interpreter, Node
from torch.utils import _pytree as pytree

from decouplify.decoupling import Decoupling, decoupling_of
from decouplify.sparse.lower import Lowered, lower
from decouplify.sparse.ops import SparseConv2d, SparseLinear, count
from decouplify.surgery import record_and_match, unwrap
from decouplify.trace import copy_sharing_tensors

__all__ = ["SparseModel", "backend", "sparsify"]


def backend() -> str:
    """Which implementation runs the sparse operators, and why."""
    return "reference: pure torch (index_select and dense convolutions); no native kernels are part of this version"


def sparsify(model: nn.Module) -> SparseModel:
    """A copy of a wrapped model that computes, for each image, only open filters from existing channels.

    The copy is a snapshot on the CPU: norms are folded, later training of ``model`` does not reach it. Its output is
    that of ``model.eval()`` up to rounding; ``verify`` checks it.

    Args:
        model: A wrapped model; unchanged.

    Raises:
        ValueError: If the model is not wrapped.
    """
    decoupling = decoupling_of(model, "sparsify")
    owner = next(m for m in model.modules() if getattr(m, "decoupling", None) is decoupling)
    return SparseModel(owner)


class SparseModel(nn.Module):
    """The sparse form of a wrapped model. Each image has its own path, so a batch runs image by image.

    Image sizes other than the one the model was wrapped for are recorded when they first occur.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        snapshot = copy_sharing_tensors(model, _to_cpu)
        decoupling = snapshot.decoupling
        assert isinstance(decoupling, Decoupling)
        self.plan = decoupling.plan
        # In a list, because the snapshot is material for lowering and not a part of this module.
        self._source = [unwrap(snapshot).eval()]
        self._decoupling = [decoupling.eval()]
        self._lowered: dict[tuple[int, ...], Lowered] = {}
        self.graphs = nn.ModuleList()
        self.lowered_for(self.plan.input_size)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Any:
        """What the wrapped model returns for a batch, computed image by image.

        Args:
            images: Shape (N, C, H, W), on the CPU, N >= 1.

        Raises:
            ValueError: If the images have another rank or are not on the CPU.
        """
        self._check(images)
        lowered = self.lowered_for(tuple(images.shape[1:]))
        count(lowered.n_recorded_macs * len(images))
        return _stack([lowered.module(image[None]) for image in images])

    @torch.no_grad()
    def run_observed(
        self,
        image: Tensor,
        observer: Callable[[str, Tensor], None],
        forced: Mapping[str, Tensor] | None = None,
    ) -> Any:
        """Run one image, (1, C, H, W), calling ``observer(node name, value)``; ``forced`` replaces gates by name."""
        self._check(image)
        lowered = self.lowered_for(tuple(image.shape[1:]))
        replaced = {lowered.gates[name]: value for name, value in (forced or {}).items()}
        return _Observing(lowered.module, observer, replaced).run(image)

    def lowered_for(self, size: tuple[int, ...]) -> Lowered:
        """The sparse form for one image size (C, H, W)."""
        if size not in self._lowered:
            recorded, matching = record_and_match(self._source[0], size, self.plan.options)
            _check_same_gates(self.plan, matching.plan, size)
            self._lowered[size] = lower(recorded, matching, self._decoupling[0])
            self.graphs.append(self._lowered[size].module)
        return self._lowered[size]

    def __repr__(self) -> str:
        lowered = self.lowered_for(self.plan.input_size)
        kinds = Counter(
            type(m).__name__ for m in lowered.module.modules() if isinstance(m, (SparseConv2d, SparseLinear))
        )
        others = Counter(_operator_name(n) for n in lowered.module.graph.nodes if n.op == "call_function")
        lines = [
            f"SparseModel of {self.plan.model} for {self.plan.input_size} images",
            f"  backend: {backend()}",
            f"  gates: {len(lowered.gates)}, filters: {self.plan.n_filters}",
            "  sparse operators: " + ", ".join(f"{n} {kind}" for kind, n in kinds.items()),
            "  as recorded: " + (", ".join(f"{n} {name}" for name, n in others.most_common()) or "nothing"),
        ]
        return "\n".join(lines)

    def _check(self, images: Tensor) -> None:
        if images.dim() != 4 or len(images) == 0:
            raise ValueError(
                f"SparseModel: images of shape {tuple(images.shape)} given; (N, C, H, W) with N >= 1 wanted"
            )
        if images.device.type != "cpu":
            raise ValueError(f"SparseModel runs on the CPU; the images are on {images.device}, move them with .cpu()")


class _Observing(Interpreter):
    """Runs a graph node by node, showing each value and replacing some."""

    def __init__(self, module: Any, observer: Callable[[str, Tensor], None], replaced: Mapping[str, Tensor]) -> None:
        super().__init__(module)
        self._observer, self._replaced = observer, replaced

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor) and n.op.startswith("call_"):
            # In-place operators that follow would change what the observer has seen.
            self._observer(n.name, value.clone())
        return self._replaced.get(n.name, value)


def _to_cpu(tensor: Tensor) -> Tensor:
    copied = tensor.detach().to("cpu", copy=True)
    return nn.Parameter(copied, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copied


def _stack(results: list[Any]) -> Any:
    """Batches of one joined along the first dimension, in whatever structure the model returns."""
    if len(results) == 1:
        return results[0]
    leaves = [pytree.tree_flatten(result)[0] for result in results]
    structure = pytree.tree_flatten(results[0])[1]
    if any(isinstance(leaf, Tensor) and leaf.dim() == 0 for leaf in leaves[0]):
        raise ValueError("SparseModel: the model returns a number for the whole batch; give it one image at a time")
    joined = [torch.cat(column) if isinstance(column[0], Tensor) else column[0] for column in zip(*leaves, strict=True)]
    return pytree.tree_unflatten(joined, structure)


def _check_same_gates(wrapped: Any, found: Any, size: tuple[int, ...]) -> None:
    ours = [(g.name, g.n_filters) for g in wrapped.gates]
    theirs = [(g.name, g.n_filters) for g in found.gates]
    if ours != theirs:
        raise ValueError(
            f"SparseModel: on images of size {size} the model runs other convolutions than on {wrapped.input_size}, "
            "for which it was wrapped; resize the images"
        )


def _operator_name(node: Node) -> str:
    return getattr(getattr(node.target, "_schema", None), "name", getattr(node.target, "__name__", "?")).removeprefix(
        "aten::"
    )
