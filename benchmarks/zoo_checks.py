"""What the coverage sweep looks at in one network: first its plan, then the numbers of its masked and sparse form."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from zoo_networks import build, image_size

import decouplify
from decouplify.errors import PlanError
from decouplify.modes import eval_mode

__all__ = ["check_numbers", "check_plan", "check_smaller_build", "may_be_built_smaller"]

SMALL = 96  # pixels; networks that cannot run on so small an image get their own size
SMALL_FROM_GMACS = 0.2  # below this a network runs on its own size
SMALLER_BUILDS = (96, 128, 160, 192, 224, 256)  # pixels, for networks that are built for one size

BORDERLINE = 1e-5  # relative error of the sparse form in float32 above which float64 decides

Row = dict[str, Any]


def check_plan(name: str) -> Row:
    """What would be gated and what not."""
    start = time.monotonic()
    try:
        model, device, plan = _planned(name)
    except PlanError as error:
        return {"sites": 0, "checked": f"nothing to gate: {error}"}
    row: Row = {
        "device": device,
        "n_params": sum(p.numel() for p in model.parameters()),
        "sites": len(plan.sites),
        "gates": len(plan.gates),
        "linear_as_conv": plan.options.linear_as_conv,
        "gated_share": round(plan.gated_share, 4),
        "gmacs": round(plan.n_macs / 1e9, 3),
        "conv_share": round(_conv_share(plan), 4),
        "refused": Counter(r.reason for r in plan.refused),
        "own_size": list(plan.input_size),
    }
    if not plan.sites:
        return {**row, "checked": f"nothing to gate: {_why_nothing(plan)}"}
    small = _on_small_image(model, plan)
    row |= {"size": list(small.input_size), "gmacs_checked": round(small.n_macs / 1e9, 3)}
    return {**row, "checked": "pending", "seconds": round(time.monotonic() - start, 1)}


def _planned(name: str) -> tuple[nn.Module, str, decouplify.Plan]:
    """A network and its plan, without memory where possible: some compute with values, or ask for their device."""
    try:
        with torch.device("meta"):
            model = build(name).eval()
        return model, "meta", _plan(model, image_size(name))
    except PlanError:
        raise
    except Exception:  # whatever a constructor or a forward raises when a value is missing
        model = build(name).eval()
        return model, "cpu", _plan(model, image_size(name))


def _plan(model: nn.Module, size: tuple[int, ...] | None) -> decouplify.Plan:
    """The default plan; with linear layers on maps as well where most of a network lies outside its convolutions."""
    plan = decouplify.inspect(model, size)
    if _conv_share(plan) > 0.5:
        return plan
    with_linears = decouplify.inspect(model, size, linear_as_conv=True)
    return with_linears if len(with_linears.sites) > len(plan.sites) else plan


def _conv_share(plan: decouplify.Plan) -> float:
    """Share of all multiply-accumulates that lie in convolutions (or sites)."""
    return (sum(s.n_macs for s in plan.sites) + sum(r.n_macs for r in plan.refused)) / plan.n_macs


def _why_nothing(plan: decouplify.Plan) -> str:
    return "; ".join(f"{n} {reason}" for reason, n in Counter(r.reason for r in plan.refused).items())


def _on_small_image(model: nn.Module, plan: decouplify.Plan) -> decouplify.Plan:
    """The plan for a small image if the network runs the same sites on it, else its own."""
    if plan.n_macs < SMALL_FROM_GMACS * 1e9:
        return plan
    try:
        size = (plan.input_size[0], SMALL, SMALL)
        small = decouplify.inspect(model, size, linear_as_conv=plan.options.linear_as_conv)
    except ValueError:
        return plan
    return small if [s.name for s in small.sites] == [s.name for s in plan.sites] else plan


def may_be_built_smaller(row: Row) -> bool:
    """Whether a network took no small image, and nobody has asked its constructor for a small size yet."""
    took_none = row.get("gmacs_checked", 0.0) > max(SMALL_FROM_GMACS, 0.9 * row.get("gmacs", 0.0))
    return took_none and "built_for" not in row and row["device"] == "meta"


def check_smaller_build(name: str, planned: Row) -> Row:
    """The smallest images on which a network runs the same sites, built for them or (``built_for`` None) as it is."""
    for side in SMALLER_BUILDS:
        for built_for in (side, None):
            size = (*planned["own_size"][:-2], side, side)
            if side < planned["own_size"][-1] and (n_macs := _macs_if_same_sites(name, planned, size, built_for)):
                return {"built_for": built_for, "size": list(size), "gmacs_checked": round(n_macs / 1e9, 3)}
    return {"built_for": None}


def _macs_if_same_sites(name: str, planned: Row, size: tuple[int, ...], built_for: int | None) -> int | None:
    """None if a network cannot be built so or does not run on the size, has other sites there, or nothing is saved."""
    try:
        with torch.device("meta"):
            model = build(name, built_for).eval()
        plan = decouplify.inspect(model, size, linear_as_conv=planned["linear_as_conv"])
    except Exception:  # whatever a constructor or a forward raises when windows or grids do not fit
        return None
    found = (len(plan.sites), len(plan.gates), Counter(r.reason for r in plan.refused))
    same = found == (planned["sites"], planned["gates"], Counter(planned["refused"]))
    return plan.n_macs if same and plan.n_macs < 0.9e9 * planned["gmacs"] else None


def check_numbers(name: str, planned: Row, light: bool = False) -> Row:
    """Compare the original, wrapped, sparse and unwrapped network, all with random weights.

    Args:
        name: The network.
        planned: Its row.
        light: Compare one image instead of two and no training step, and keep memory small.
    """
    start = time.monotonic()
    torch.manual_seed(0)
    size = tuple(planned["size"])
    images = torch.randn(1 if light else 2, *size)
    model = calmed(randomised(build(name, planned.get("built_for"))).eval(), images)
    keys, state, before = list(model.state_dict()), module_state(model), outputs(model, images)
    reference = None if light else training_step(model, images)
    wrap: dict[str, Any] = {"linear_as_conv": planned["linear_as_conv"]}
    if light:  # heads for 21,841 classes would take ten times the memory of the network, and nothing trains here
        wrap |= {"reduction": 16, "n_classes": 2}
    # wrap itself compares bits and looks for zeros where they are predicted; what follows repeats the first on these.
    decouplify.wrap(model, size, **wrap)
    row: Row = {
        "same_plan": len(model.decoupling.plan.sites) == planned["sites"],
        "eval_bitwise": same(before, outputs(model, images)),
        "keys_kept": [k for k in model.state_dict() if not k.startswith("decoupling.")] == keys,
    }
    if not light:
        with model.decoupling.forced({g.name: torch.ones(g.n_filters) for g in model.decoupling.plan.gates}):
            row["train_equal"] = close(reference, training_step(model, images))
    row |= check_sparse(model, images, light)
    if row["sparse_error"] > BORDERLINE:
        row["masked_error"] = masked_error(model, images[:1])
    decouplify.unwrap(model)
    row["unwrap_identical"] = module_state(model) == state and same(before, outputs(model, images))
    if row["sparse_error"] > BORDERLINE:
        decouplify.wrap(model.double(), size, verify=False, **wrap)
        row["sparse_error_float64"] = check_sparse(model, images.double(), light)["sparse_error"]
    checked = "numbers, no training step" if light else "numbers"
    return {**row, "checked": checked, "seconds": round(time.monotonic() - start, 1)}


def check_sparse(model: nn.Module, images: Tensor, light: bool) -> Row:
    """Masked against sparse form with random gates, the largest relative difference of any gated value or output.

    Raises:
        VerificationError: If a gate differs that is not borderline.
    """
    randomise_gates(model)
    row: Row = {"mac_reduction_random_gates": round(decouplify.count_macs(model, images).reduction, 3)}
    with weights_shared() if light else nullcontext():
        fast = decouplify.sparsify(model)
    return {**row, "sparse_error": decouplify.verify(model, fast, images[:1], rtol=float("inf")).max_error}


@torch.no_grad()
def masked_error(model: nn.Module, image: Tensor) -> float:
    """How far the masked form in float32 itself is from that in float64 with the same gates, relative: its condition.

    Random weights make some deep networks chaotic; no other order of the same sums can be expected to be closer.
    """
    found = outputs(model, image)
    gates = {name: z.double() for name, z in model.decoupling.gates().items()}
    with model.double().decoupling.forced(gates):
        wanted = outputs(model, image.double())
    model.float()
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, wanted, strict=True))


@contextmanager
def weights_shared() -> Iterator[None]:
    """While it lasts, ``sparsify`` takes no snapshot: nothing trains here, and the largest weights fit only once.

    Norms must then not be folded in place, for they are the model's own.
    """

    def share(tensor: Tensor) -> Tensor:
        shared = tensor.detach()
        return nn.Parameter(shared, requires_grad=False) if isinstance(tensor, nn.Parameter) else shared

    with (
        mock.patch("decouplify.sparse.model._to_cpu", share),
        mock.patch("decouplify.sparse.lower._Lowering._keep_folded"),
    ):
        yield


def randomised(model: nn.Module) -> nn.Module:
    """Statistics and gains that no channel has by accident; gains that start at zero would hide half of a network."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.3)
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.numel() and not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model


def calmed(model: nn.Module, images: Tensor) -> nn.Module:
    """The network with gains so small that its output is finite; some multiply features with features."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.affine]
    for _ in range(5):
        if all(t.isfinite().all() for t in outputs(model, images)):
            break
        for norm in norms:
            norm.weight.data.mul_(0.5)
    return model


def randomise_gates(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for controller in model.decoupling.controllers.values():
        with torch.no_grad():
            controller.fc2.bias.copy_(torch.randn(controller.fc2.bias.shape, generator=generator))


def module_state(model: nn.Module) -> Any:
    return [(n, len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for n, m in model.named_modules()]


def outputs(model: nn.Module, images: Tensor) -> list[Tensor]:
    with eval_mode(model), torch.no_grad():
        # A clone, because some networks normalise their images in place.
        return [t for t in pytree.tree_leaves(model(images.clone())) if isinstance(t, Tensor)]


def training_step(model: nn.Module, images: Tensor) -> list[Tensor] | None:
    """Outputs and gradients of one step in train mode; None if the network cannot train on this size."""
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    torch.manual_seed(0)
    model.train()
    try:
        leaves = [t for t in pytree.tree_leaves(model(images.clone())) if isinstance(t, Tensor)]
        sum(t.float().sin().sum() for t in leaves).backward()
        ours = {id(p) for p in model.decoupling.parameters()} if hasattr(model, "decoupling") else set()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None and id(p) not in ours]
        return [t.detach() for t in leaves] + grads
    except (ValueError, RuntimeError):  # batch norm over a single value, or an auxiliary head over none
        return None
    finally:
        model.zero_grad()
        model.eval()
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name in buffers:
                    buffer.copy_(buffers[name])


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def close(a: list[Tensor] | None, b: list[Tensor] | None) -> bool | None:
    """Equal up to the order of sums, which the memory layout of a product may change; None if not comparable.

    A gradient that is zero but for rounding is known as well as the terms of its sum are, so the largest of all
    gradients tells how far it may be off.
    """
    if a is None or b is None:
        return None
    largest = [float(x.abs().max()) if x.numel() else 0.0 for x in a]
    return len(a) == len(b) and all(
        float((x - y).abs().max()) <= 1e-3 * size + 1e-6 * max(1.0, *largest)
        for x, y, size in zip(a, b, largest, strict=True)
        if x.numel()
    )
