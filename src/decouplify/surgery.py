"""Apply a plan to the user's module tree in place, and undo it exactly.

The model stays the object it was: same class, methods, state_dict keys. What is added is one child, ``decoupling``, and
forward hooks, which are small picklable objects, so that copies and pickles of a wrapped model are wrapped models.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from decouplify.aten import name_of
from decouplify.costs import CostModel
from decouplify.decoupling import Decoupling
from decouplify.errors import PlanError, TraceError
from decouplify.plan import End, Options, Plan
from decouplify.selfcheck import (
    affordable_size,
    check_known_channels,
    check_same_outputs,
    outputs,
    random_images,
)
from decouplify.sites import Matching, match
from decouplify.trace import Trace, default_input_size, trace

__all__ = ["inspect", "record_again", "record_and_match", "unwrap", "wrap"]


def inspect(
    model: nn.Module,
    input_size: tuple[int, ...] | None = None,
    *,
    skip_first: bool = True,
    skip_last: bool = False,
    reduction: int = 4,
    bias: float = 2.0,
    input_norm: bool = False,
    linear_as_conv: bool = False,
    only: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
) -> Plan:
    """What ``wrap`` with the same arguments would do; changes nothing. Print it for a table.

    Args:
        model: A network that takes one image tensor (N, C, H, W).
        input_size: Size (C, H, W) of one image; by default what a timm model declares, else (channels, 224, 224).
        skip_first: Leave the convolutions that read the image alone.
        skip_last: Leave the last convolution alone.
        reduction: Input channels per hidden unit of a controller.
        bias: Initial logit of all gates.
        input_norm: Normalise the controllers' pooled inputs over the batch.
        linear_as_conv: Also gate linear layers on (N, H, W, C) maps.
        only: Names or globs of the convolutions to gate (default: all).
        exclude: Names or globs of convolutions to leave alone.

    Raises:
        TraceError: If the model does not run on images of this size.
        PlanError: If the model is wrapped already, has no convolution, or a glob matches none.
    """
    options = _options(skip_first, skip_last, reduction, bias, input_norm, linear_as_conv, only, exclude)
    return record_and_match(model, input_size, options)[1].plan


def wrap(
    model: nn.Module,
    input_size: tuple[int, ...] | None = None,
    *,
    skip_first: bool = True,
    skip_last: bool = False,
    reduction: int = 4,
    bias: float = 2.0,
    input_norm: bool = False,
    linear_as_conv: bool = False,
    only: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
    n_classes: int | None = None,
    frozen_ok: bool = False,
    verify: bool = True,
) -> nn.Module:
    """The same model, with a controller for every convolution that can be gated.

    In place: ``wrap`` returns the object it was given, with one new child ``decoupling`` and forward hooks. All gates
    start open, so in eval mode the outputs are the same bits as before.

    Args:
        model: A network that takes one image tensor (N, C, H, W).
        input_size: See ``inspect``, as for ``skip_first`` ... ``exclude``.
        skip_first: Leave the convolutions that read the image alone.
        skip_last: Leave the last convolution alone.
        reduction: Input channels per hidden unit of a controller.
        bias: Initial logit of all gates; positive: all open.
        input_norm: Normalise the controllers' pooled inputs over the batch.
        linear_as_conv: Also gate linear layers on (N, H, W, C) maps.
        only: Names or globs of the convolutions to gate (default: all).
        exclude: Names or globs of convolutions to leave alone.
        n_classes: Values of the attribute that gates shall tell (mutual-information loss); by default the classes the
            model outputs. A model that outputs no (N, classes) tensor gets no heads unless this is given. A gate's head
            has a weight for each filter and class: with 21,841 classes all heads together can be ten times the model,
            and a coarser attribute serves as well.
        frozen_ok: Accept a model of which no parameter is trained; then only its gates will learn.
        verify: Run the model on random images: with gates open the output must be the same bits, and with random gates
            every channel predicted to be zero must be zero, or the constant that was predicted. Networks of many
            multiply-accumulates run on smaller images, if they then have the same sites. Not possible on the meta
            device.

    Raises:
        TraceError: If the model does not run on images of this size.
        PlanError: If the model is wrapped already, has no convolution that can be gated, or is frozen; or if
            verification fails. The model is unchanged after any error.
    """
    options = _options(skip_first, skip_last, reduction, bias, input_norm, linear_as_conv, only, exclude)
    _check_trainable(model, frozen_ok)
    recorded, matching = record_and_match(model, input_size, options)
    _check_not_empty(matching.plan)
    costs = CostModel.of(recorded, matching)
    images = random_images(model, _verification_size(model, matching.plan)) if verify else None
    before = outputs(model, images) if images is not None else None
    decoupling = Decoupling(matching.plan, costs, n_classes if n_classes is not None else matching.plan.n_classes)
    try:
        _install(model, decoupling)
        if images is not None and bias > 0:
            check_same_outputs(before, outputs(model, images))
        if images is not None:
            check_known_channels(model, decoupling, images)
        decoupling.drop_forward()  # those of the checks are nobody's business
    except BaseException:
        unwrap(model)
        raise
    return model


def unwrap(model: nn.Module) -> nn.Module:
    """The original model again: no hooks of ours, no ``decoupling``; trained weights are kept.

    Raises:
        ValueError: If the model is not wrapped.
    """
    if not isinstance(getattr(model, "decoupling", None), Decoupling):
        raise ValueError(f"unwrap: {type(model).__name__} is not wrapped")
    for module in model.modules():
        tables: list[dict[int, Any]] = [module._forward_pre_hooks, module._forward_hooks]
        for hooks in tables:
            for key in [key for key, hook in hooks.items() if isinstance(hook, _Hook)]:
                del hooks[key]
    del model.decoupling
    return model


def record_and_match(model: nn.Module, input_size: tuple[int, ...] | None, options: Options) -> tuple[Trace, Matching]:
    """The recorded run of an unwrapped model and its sites.

    Raises:
        TraceError: If the model does not run on images of this size.
        PlanError: If the model is wrapped already or has no convolution, or a glob matches none.
    """
    if any(isinstance(module, Decoupling) for module in model.modules()):
        raise PlanError(f"{type(model).__name__} is wrapped already; decouplify.unwrap(model) gives the original back")
    if hasattr(model, "decoupling"):
        raise PlanError(f"{type(model).__name__} has an attribute 'decoupling' of its own, the name that wrap needs")
    size = tuple(input_size) if input_size is not None else default_input_size(model)
    try:
        recorded = trace(model, size)
    except TraceError as error:
        if not any(isinstance(module, nn.modules.conv._ConvNd) for module in model.modules()):
            raise PlanError(
                f"{type(model).__name__} has no convolution (and {error}) so there is nothing to gate"
            ) from error
        raise
    matching = match(recorded, options, type(model).__name__)
    if not matching.plan.sites and not matching.plan.refused:
        linears = any(name_of(node) == "linear" for node in recorded.graph.nodes)
        hint = "; its linear layers on (N, H, W, C) maps can be gated with linear_as_conv=True" if linears else ""
        raise PlanError(f"{type(model).__name__} runs no convolution, so there is nothing to gate{hint}")
    return recorded, matching


def record_again(model: nn.Module, input_size: tuple[int, ...], plan: Plan, caller: str) -> tuple[Trace, Matching]:
    """``record_and_match`` of a model that has been wrapped, and unwrapped, on images of perhaps another size.

    Raises:
        ValueError: If it has other gates on these images than in its plan, besides what ``record_and_match`` raises.
    """
    recorded, matching = record_and_match(model, input_size, plan.options)
    if [(g.name, g.n_filters) for g in matching.plan.gates] != [(g.name, g.n_filters) for g in plan.gates]:
        raise ValueError(
            f"{caller}: on images of size {tuple(input_size)} the model runs other convolutions than on "
            f"{plan.input_size}, for which it was wrapped; resize the images"
        )
    return recorded, matching


def _verification_size(model: nn.Module, plan: Plan) -> tuple[int, ...]:
    """A small image size on which the model has the same sites, else the plan's."""
    size = affordable_size(plan)
    if size == plan.input_size:
        return size
    try:
        small = record_and_match(model, size, plan.options)[1].plan
    except ValueError:
        return plan.input_size
    same = [(s.name, s.gate, s.end) for s in small.sites] == [(s.name, s.gate, s.end) for s in plan.sites]
    return size if same else plan.input_size


def _options(
    skip_first: bool,
    skip_last: bool,
    reduction: int,
    bias: float,
    input_norm: bool,
    linear_as_conv: bool,
    only: str | Iterable[str],
    exclude: str | Iterable[str],
) -> Options:
    if reduction < 1:
        raise ValueError(f"reduction={reduction}: a controller needs at least one input channel per hidden unit")
    globs = [(patterns,) if isinstance(patterns, str) else tuple(patterns) for patterns in (only, exclude)]
    return Options(skip_first, skip_last, reduction, float(bias), input_norm, linear_as_conv, *globs)


def _check_trainable(model: nn.Module, frozen_ok: bool) -> None:
    parameters = list(model.parameters())
    if parameters and not frozen_ok and not any(p.requires_grad for p in parameters):
        raise PlanError(
            f"all {len(parameters)} parameters of {type(model).__name__} are frozen (requires_grad=False), so the "
            "network could not adapt to its gates. Call model.requires_grad_(True), or pass frozen_ok=True to train "
            "gates only."
        )


def _check_not_empty(plan: Plan) -> None:
    if not plan.sites:
        raise PlanError(f"no convolution of {plan.model} can be gated:\n{plan}")


class _Hook:
    """Base of all hooks of ours, so that ``unwrap`` knows them, also in a copy of the model."""

    def __init__(self, decoupling: Decoupling) -> None:
        self.decoupling = decoupling


class _Begin(_Hook):
    def __call__(self, module: nn.Module, args: Any) -> None:
        self.decoupling.begin_forward()


class _Compute(_Hook):
    def __init__(self, decoupling: Decoupling, gate: str) -> None:
        super().__init__(decoupling)
        self.gate = gate

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.decoupling.compute_gate(self.gate, args[0])


class _Remember(_Hook):
    def __init__(self, decoupling: Decoupling, end: End) -> None:
        super().__init__(decoupling)
        self.end = end

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.decoupling.remember(self.end, output)


class _Apply(_Hook):
    def __init__(self, decoupling: Decoupling, gate: str, end: End) -> None:
        super().__init__(decoupling)
        self.gate, self.end = gate, end

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if self.end.after is not None and not self.decoupling.is_meant(self.end, args[0] if args else None):
            return None
        return self.decoupling.apply_gate(self.gate, self.end, output)


def _install(model: nn.Module, decoupling: Decoupling) -> None:
    sample = next((p for p in model.parameters() if p.is_floating_point()), None)
    model.decoupling = decoupling.to(sample.device) if sample is not None else decoupling
    decoupling.train(model.training)
    model.register_forward_pre_hook(_Begin(decoupling))
    for gate in decoupling.plan.gates:
        model.get_submodule(gate.name).register_forward_pre_hook(_Compute(decoupling, gate.name))
        for end in gate.ends:
            if end.after is not None:
                model.get_submodule(end.after).register_forward_hook(_Remember(decoupling, end))
            model.get_submodule(end.module).register_forward_hook(_Apply(decoupling, gate.name, end))
