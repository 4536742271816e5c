"""Random gates that cost what they should, and controllers that decide them image by image.

A benchmark needs gates at a stated cost before anybody has trained a network to it. Forcing gates from outside would
time a network without its controllers; controllers that decide the same for every image would time one path whose
weights stay in the caches. Here the paths are drawn at random, one per image, and the controllers are solved for them:
they run as trained ones do, and give each image its own path.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from decouplify.controller import ArchitectureController
from decouplify.costs import CostModel
from decouplify.decoupling import decoupling_of, module_key
from decouplify.modes import eval_mode
from decouplify.plan import Plan

__all__ = ["calibrate_norms", "max_paths", "random_images", "random_path", "steer"]

_N_BISECTIONS = 40


def random_images(n: int, size: tuple[int, ...], seed: int = 0) -> Tensor:
    """Noise around a colour that differs from image to image, shape (n, *size)."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.randn(n, size[0], 1, 1, generator=generator)
    return torch.randn(n, *size, generator=generator) + colours


def calibrate_norms(model: nn.Module, images: Tensor) -> None:
    """Give the batch norms of an untrained network the statistics of these images.

    Freshly initialised running statistics let features grow or vanish from layer to layer, down to denormal numbers
    that slow down some runtimes and not others.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    with eval_mode(model), torch.no_grad():
        for norm in norms:
            norm.momentum = 1.0
            norm.train()
        model(images.clone())
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def max_paths(plan: Plan) -> int:
    """For how many images ``steer`` can give every controller a path of its own."""
    return 1 + min(max(1, gate.n_inputs // plan.options.reduction) for gate in plan.gates)


def random_path(
    plan: Plan,
    costs: CostModel,
    n_images: int,
    *,
    keep: float | None = None,
    mac_reduction: float | None = None,
    seed: int = 0,
) -> Tensor:
    """Gates drawn independently, each open with the same probability.

    Args:
        plan: Which gates there are.
        costs: Multiply-accumulates as a function of the gates.
        n_images: Number of paths.
        keep: The probability, in (0, 1]; or
        mac_reduction: dense MACs / mean executed MACs, controllers included, at which the probability shall be found.
        seed: Of the draw.

    Returns:
        Zeros and ones, shape (n_images, F), the gates in the order of the plan.

    Raises:
        ValueError: If neither or both are given, or no probability gives this reduction.
    """
    if (keep is None) == (mac_reduction is None):
        raise ValueError(f"random_path: keep={keep} and mac_reduction={mac_reduction} given; one of them is wanted")
    draw = torch.rand(n_images, plan.n_filters, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if keep is not None:
        if not 0 < keep <= 1:
            raise ValueError(f"random_path: keep={keep}; a probability in (0, 1] is wanted")
        return (draw < keep).double()
    assert mac_reduction is not None
    return (draw < _probability(costs, draw, mac_reduction)).double()


def _probability(costs: CostModel, draw: Tensor, mac_reduction: float) -> float:
    """Bisection: with the draw held fixed, the cost never falls as the probability grows."""

    def reduction(probability: float) -> float:
        return costs.n_dense / float(costs.executed((draw < probability).double()).mean())

    least, most = reduction(1.0), reduction(0.0)
    if not least <= mac_reduction <= most:
        raise ValueError(
            f"no gates give a MAC reduction of {mac_reduction:g}: all open they give {least:.3g}, all closed {most:.3g}"
        )
    low, high = 0.0, 1.0
    for _ in range(_N_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if reduction(middle) > mac_reduction else (low, middle)
    return high


@torch.no_grad()
def steer(model: nn.Module, images: Tensor, path: Tensor) -> None:
    """Replace the weights of all controllers so that each image gets the given path.

    A controller sees N images as N points in the space of its pooled channels. Its first layer is set to the principal
    directions of these points, which turns them into orthonormal scores, and its second to the combination of scores
    that is +1 for open and -1 for closed. All logits then lie as far from the threshold as they can.

    Args:
        model: A wrapped model without ``input_norm``.
        images: Shape (N, C, H, W), with N at most ``max_paths(plan)``.
        path: Zeros and ones, shape (N, F).

    Raises:
        ValueError: If there are too many images, or a controller cannot tell them apart.
    """
    decoupling = decoupling_of(model, "steer")
    plan = decoupling.plan
    if len(images) > max_paths(plan) or plan.options.input_norm:
        raise ValueError(
            f"steer: {len(images)} images given, input_norm={plan.options.input_norm}; at most {max_paths(plan)} "
            "and False wanted"
        )
    columns = path.split([gate.n_filters for gate in plan.gates], dim=1)
    handles = [
        _steer_when_called(decoupling.controllers[module_key(gate.name)], z, gate.name)
        for gate, z in zip(plan.gates, columns, strict=True)
    ]
    try:  # one forward, in which every controller sees its input under the gates before it
        with eval_mode(model):
            model(images.clone())
    finally:
        for handle in handles:
            handle.remove()
        decoupling.drop_forward()


def _steer_when_called(controller: nn.Module, z: Tensor, name: str) -> RemovableHandle:
    assert isinstance(controller, ArchitectureController)

    def solve(_: nn.Module, args: tuple[Tensor]) -> None:
        pooled = args[0].double().mean((2, 3) if controller.input_axis == 1 else (1, 2))
        _solve(controller, pooled, z.double(), name)

    return controller.register_forward_pre_hook(solve)


def _solve(controller: ArchitectureController, pooled: Tensor, z: Tensor, name: str) -> None:
    fc1, fc2 = controller.fc1, controller.fc2
    n_scores = len(pooled) - 1
    mean = pooled.mean(0)
    scores, lengths, directions = torch.linalg.svd(pooled - mean, full_matrices=False)
    if n_scores and lengths[n_scores - 1] < 1e-5 * pooled.norm():
        raise ValueError(f"steer: the controller of '{name}' sees almost the same features in several images")
    whitening = directions[:n_scores] / lengths[:n_scores, None]
    # Scores lie in [-1, 1]; shifted by one they pass the ReLU unchanged. The other hidden units stay as they are.
    fc1.weight[:n_scores] = whitening.to(fc1.weight)
    fc1.bias[:n_scores] = (1 - whitening @ mean).to(fc1.bias)
    wanted = 2 * z - 1
    readout = (scores[:, :n_scores].T @ wanted).T
    fc2.weight.zero_()
    fc2.weight[:, :n_scores] = readout.to(fc2.weight)
    fc2.bias.copy_(wanted.mean(0) - readout.sum(1))
