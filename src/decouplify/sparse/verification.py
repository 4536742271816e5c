"""Compare the masked and the sparse form of a model, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from decouplify.decoupling import Decoupling, decoupling_of
from decouplify.errors import NonFiniteError, VerificationError
from decouplify.modes import eval_mode
from decouplify.plan import End
from decouplify.sparse.model import SparseModel

__all__ = ["LayerComparison", "VerificationReport", "verify"]

#: Logits closer to the threshold than this may fall on either side of it under different rounding.
NEAR_THRESHOLD = 1e-4

_LIKE_ROUNDING = 2e-4  # relative errors below this have been rounding; a wrong channel makes far larger ones


@dataclass(frozen=True)
class LayerComparison:
    """One gated value in both forms.

    Attributes:
        module: Where the gate sits.
        gate: Which gate.
        error: max |sparse - masked| / max |masked| over all images.
        n_differing: Gates that differ between the forms, over all images.
    """

    module: str
    gate: str
    error: float
    n_differing: int


@dataclass(frozen=True)
class VerificationReport:
    """Result of ``verify``; print it for a table.

    Attributes:
        layers: One row per gated value, in execution order.
        output_error: max |sparse - masked| / max |masked| of the output.
        n_images: Images compared.
        n_gates: Gate decisions compared.
        n_near: Decisions that differed but lay within 1e-4 of the threshold; features were then compared with the
            masked form's gates forced on the sparse form.
    """

    layers: tuple[LayerComparison, ...]
    output_error: float
    n_images: int
    n_gates: int
    n_near: int

    @property
    def max_error(self) -> float:
        """The largest relative error anywhere."""
        return max(self.output_error, *(layer.error for layer in self.layers))

    def __str__(self) -> str:
        worst = max(self.layers, key=lambda layer: layer.error)
        differing = sum(layer.n_differing for layer in self.layers)
        return (
            f"{self.n_images} images: output error {self.output_error:.1e}, worst layer {worst.module} "
            f"{worst.error:.1e}; {differing} of {self.n_gates} gates differ, {self.n_near} of them within "
            f"{NEAR_THRESHOLD} of the threshold"
        )


def verify(model: nn.Module, fast: SparseModel, images: Tensor, rtol: float = 1e-5) -> VerificationReport:
    """Whether the sparse form computes what the masked form does, for every gate, layer and output.

    Args:
        model: The wrapped model; its modes are kept.
        fast: Its sparse form.
        images: Shape (N, C, H, W), finite, of the weights' type. Of types with fewer than 32 bits expect differences of
            their own precision, and other gates: compare such models in float32.
        rtol: Largest error accepted, relative to the largest magnitude of each value.

    Returns:
        Errors and gate agreement by layer.

    Raises:
        VerificationError: If an error exceeds ``rtol``, or a gate differs that is not near its threshold.
        NonFiniteError: If the images are not finite.
    """
    decoupling = decoupling_of(model, "verify")
    if not bool(images.isfinite().all()):
        raise NonFiniteError(f"verify: {int((~images.isfinite()).sum())} values of the images are NaN or infinite")
    if len(images) == 0:
        raise ValueError("verify: no images given; at least one is needed to compare anything")
    comparison = _Comparison(decoupling, fast)
    with eval_mode(model), torch.no_grad():
        # Gates that the sparse form leaves open are open in both.
        device = next(model.parameters()).device
        with decoupling.forced({name: z.to(device) for name, z in fast.left_open.items()}):
            for image in images:
                comparison.add(model, image[None])
    report = comparison.report(len(images))
    _raise_if_different(report, comparison.far, rtol, images.dtype)
    return report


class _Comparison:
    """Runs both forms image by image, so that no more than one image's features are held."""

    def __init__(self, decoupling: Decoupling, fast: SparseModel) -> None:
        self.decoupling, self.fast = decoupling, fast
        self.errors: dict[tuple[str, End], float] = {}
        self.differing: dict[str, int] = {gate.name: 0 for gate in decoupling.plan.gates}
        self.far: dict[str, float] = {}
        self.n_near = 0
        self.output_error = 0.0

    def add(self, model: nn.Module, image: Tensor) -> None:
        masked: dict[tuple[str, End], Tensor] = {}
        with self.decoupling.observed(lambda gate, end, y: masked.__setitem__((gate, end), y.cpu().clone())):
            expected = model(image.clone())  # a clone, because some models normalise their images in place
        gates = {name: z[0].cpu() for name, z in self.decoupling.gates().items()}
        self._compare_gates(gates, image.cpu())
        # With the masked form's gates on both sides, what remains is arithmetic.
        ends = self.fast.lowered_for(tuple(image.shape[1:])).ends
        nodes = {ends[end] for _, end in masked}
        found: dict[str, Tensor] = {}
        result = self.fast.run_observed(image.cpu().clone(), _keep(found, nodes), forced=gates)
        for key, y in masked.items():
            self.errors[key] = max(self.errors.get(key, 0.0), relative_error(found[ends[key[1]]], y))
        self._compare_outputs(result, expected)
        # What forward runs joins operators, so that there is nothing to compare in between.
        self._compare_outputs(self.fast.run_forced(image.cpu().clone(), gates), expected)

    def _compare_outputs(self, result: Any, expected: Any) -> None:
        for a, b in zip(pytree.tree_leaves(result), pytree.tree_leaves(expected), strict=True):
            if isinstance(b, Tensor):
                self.output_error = max(self.output_error, relative_error(a, b.cpu()))

    def _compare_gates(self, gates: dict[str, Tensor], image: Tensor) -> None:
        margins = {name: g[0].cpu() for name, g in self.decoupling.margins().items()}
        nodes = self.fast.lowered_for(tuple(image.shape[1:])).gates
        found: dict[str, Tensor] = {}
        self.fast.run_observed(image.clone(), _keep(found, set(nodes.values())))
        earlier_differs = False
        for name, z in gates.items():
            wrong = found[nodes[name]] != z
            self.differing[name] += int(wrong.sum())
            near = wrong & (margins[name].abs() < NEAR_THRESHOLD)
            self.n_near += int(near.sum())
            # Downstream of a near-threshold flip the features differ for real, and so may any gate.
            if bool((wrong & ~near).any()) and not earlier_differs:
                self.far[name] = float(margins[name][wrong & ~near].abs().max())
            earlier_differs = earlier_differs or bool(wrong.any())

    def report(self, n_images: int) -> VerificationReport:
        layers = tuple(
            LayerComparison(end.module, gate, error, self.differing[gate]) for (gate, end), error in self.errors.items()
        )
        n_gates = n_images * self.decoupling.plan.n_filters
        return VerificationReport(layers, self.output_error, n_images, n_gates, self.n_near)


def _keep(found: dict[str, Tensor], nodes: Collection[str]) -> Callable[[str, Tensor], None]:
    """An observer that keeps the values of some nodes; all of a large network at once would not fit into memory."""

    def observe(node: str, value: Tensor) -> None:
        if node in nodes:
            found[node] = value

    return observe


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest |found - expected| / largest |expected|; 0 if both are zero everywhere, infinite if undefined or NaN."""
    difference = float((found - expected).abs().max()) if expected.numel() else 0.0
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    error = 0.0 if difference == 0.0 else difference / scale if scale > 0 else math.inf
    return math.inf if math.isnan(error) else error


def _raise_if_different(report: VerificationReport, far: dict[str, float], rtol: float, dtype: torch.dtype) -> None:
    trained = "Was the model trained after sparsify?"
    if dtype.itemsize < 4:
        trained = (
            f"In {dtype} the two forms round every layer differently: compare them in float32. Or was the model "
            "trained after sparsify?"
        )
    if far:
        name, margin = next(iter(far.items()))
        raise VerificationError(
            f"verify: gates of '{name}' differ although their logits are up to {margin:.2g} away from the threshold. "
            f"{trained} Or do these images take paths that sparsify(paths=...) was not given? Sparsify it again.",
            report,
        )
    wrong = [layer for layer in report.layers if not layer.error <= rtol]
    if wrong or not report.output_error <= rtol:
        first = f"'{wrong[0].module}' by {wrong[0].error:.2g}" if wrong else f"the output by {report.output_error:.2g}"
        raise VerificationError(
            f"verify: the sparse form differs from the masked form in {len(wrong)} of {len(report.layers)} layers, "
            f"first in {first} (relative, {rtol:.0e} allowed). {_advice(report, trained)}",
            report,
        )


def _advice(report: VerificationReport, trained: str) -> str:
    if report.max_error > _LIKE_ROUNDING:
        return f"{trained} Sparsify it again."
    return (
        f"At most {report.max_error:.0e} can be rounding, which counts more where an activation such as ReLU6 cuts "
        f"large values off: then accept it with a larger rtol. {trained} Then sparsify it again."
    )
