"""Paths of a network that has no gates: filters count as open where their response is high.

With them every analysis of this package also runs on the network as it was before ``wrap``. A pseudo-path describes
what the filters did, a path decides what they do: compare the two, but do not take one for the other.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from decouplify.decoupling import Decoupling, decoupling_of
from decouplify.paths._layout import lay_out
from decouplify.paths.pathset import PathSet
from decouplify.paths.recording import Recorder, RunningIdsWarning, device_of
from decouplify.plan import End, Plan
from decouplify.surgery import wrap

__all__ = ["PseudoThresholds", "pseudo_paths", "pseudo_thresholds"]

Rule: TypeAlias = Literal["mean", "quantile", "active", "cdrp"]

_COLUMNS = 256  # filters whose pooled responses are in memory at once


@dataclass(frozen=True, eq=False)
class PseudoThresholds:
    """From which response on each filter counts as open.

    Compute them on one set of images and use them on others, as one does with everything that is fitted.

    Attributes:
        rule: ``"mean"``, ``"quantile"`` or ``"active"``; what of the filter's response is compared.
        values: Threshold per filter by layer name, float32, shape (K,) each, in execution order.
        n_images: Images they were computed on; 0 where none were needed.
    """

    rule: Rule
    values: Mapping[str, NDArray[np.float32]]
    n_images: int


def pseudo_paths(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    rule: Rule = "mean",
    quantile: float = 0.5,
    thresholds: PseudoThresholds | None = None,
    like: nn.Module | None = None,
    out: str | Path | None = None,
    margins: bool = False,
    max_images: int | None = None,
    device: str | torch.device | None = None,
    progress: bool | None = None,
    gamma: float = 0.05,
    steps: int = 30,
    lr: float = 0.1,
    **wrap_options: Any,
) -> PathSet:
    """A path for every image, read off a network that was never wrapped.

    The sites are those that ``wrap`` would find, so layers have the names they have after wrapping. The model itself is
    not changed: a copy is observed. Four rules say when a filter counts as open for an image:

    - ``"mean"``: its response, averaged over the picture, is above the mean of all images;
    - ``"quantile"``: the same with a quantile instead of the mean; the binarised activations of arXiv:2212.14268;
    - ``"active"``: it responds anywhere in the picture, which is only telling after a ReLU;
    - ``"cdrp"``: the critical data routing path of Wang et al., CVPR 2018: a factor per filter is fitted to each image
      by gradient descent so that few remain and the prediction stays; open where the factor is above 0. It takes
      ``steps`` forward and backward passes per image, starts afresh for each, and does not see other images.

    With ``"mean"`` and ``"quantile"`` the loader is read twice, the first time for the thresholds, unless they are
    given. They split each filter's images near the middle, so filter states of such paths tell nothing.

    Args:
        model: A network without gates, on any device.
        loader: As for ``decouplify.record``.
        rule: See above.
        quantile: Share of the images for which a filter is closed under ``"quantile"``, in (0, 1).
        thresholds: From ``pseudo_thresholds``; their rule is used.
        like: A wrapped model whose sites to use, instead of ``wrap_options``.
        out: As for ``record``.
        margins: Keep how far responses are above their thresholds (under ``"cdrp"`` the factors), 2 bytes per filter
            and image.
        max_images: Stop after this many images.
        device: Where to put the images; the device of the model's first parameter if not given.
        progress: As for ``record``.
        gamma: Weight of the sum of factors, ``"cdrp"`` only.
        steps: Steps of gradient descent, ``"cdrp"`` only.
        lr: Their length; the momentum is 0.9, factors stay in [0, 100].
        **wrap_options: Options of ``wrap`` that choose sites: ``input_size``, ``skip_first``, ``only``, ...

    Returns:
        The paths. ``manifest["pseudo"]`` names the rule.

    Raises:
        TypeError: If the loader cannot be read twice, or yields something else than images.
        ValueError: If the model is wrapped, the rule is unknown, the thresholds are of other filters, or the model
            cannot be traced.
    """
    rule = thresholds.rule if thresholds is not None else rule
    _check_rule(rule, quantile)
    if thresholds is None and rule in ("mean", "quantile"):
        _check_readable_twice(loader)
    observed = observable_copy(model, like, wrap_options)
    gates: _Gates
    if rule == "cdrp":
        gates = _RoutingGates(observed, gamma, steps, lr)
    else:
        options = {"max_images": max_images, "device": device, "progress": progress}
        if thresholds is None:
            thresholds = _thresholds(observed, loader, rule, quantile, options)
        gates = _ResponseGates(observed, thresholds)
    recorder = _recorder(gates, loader, margins, max_images, device, progress)
    return recorder.in_memory() if out is None else recorder.to_disk(Path(out).resolve())


def pseudo_thresholds(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    rule: Rule = "mean",
    quantile: float = 0.5,
    like: nn.Module | None = None,
    max_images: int | None = None,
    device: str | torch.device | None = None,
    progress: bool | None = None,
    **wrap_options: Any,
) -> PseudoThresholds:
    """The thresholds that ``pseudo_paths`` would use on these images, to use them on others.

    Pooled responses go to a temporary file, 2 bytes per filter and image.

    Args:
        model: A network without gates.
        loader: As for ``decouplify.record``; labels are not looked at.
        rule: ``"mean"``, ``"quantile"`` or ``"active"``; see ``pseudo_paths``, as for the rest.
        quantile: Share of the images below the threshold, in (0, 1).
        like: A wrapped model whose sites to use.
        max_images: Stop after this many images.
        device: Where to put the images.
        progress: Show a progress bar.
        **wrap_options: Options of ``wrap`` that choose sites.

    Raises:
        ValueError: If the rule has no thresholds, or the model is wrapped.
    """
    _check_rule(rule, quantile)
    if rule == "cdrp":
        raise ValueError('pseudo_thresholds: "cdrp" fits every image by itself and has no thresholds')
    observed = observable_copy(model, like, wrap_options)
    options = {"max_images": max_images, "device": device, "progress": progress}
    return _thresholds(observed, loader, rule, quantile, options)


def _check_rule(rule: str, quantile: float) -> None:
    if rule not in get_args(Rule):
        raise ValueError(f"pseudo_paths: rule is {rule!r}, wanted one of {', '.join(map(repr, get_args(Rule)))}")
    if not 0 < quantile < 1:
        raise ValueError(f"pseudo_paths: quantile is {quantile}, wanted a share of the images in (0, 1)")


def _check_readable_twice(loader: Iterable[Any]) -> None:
    if isinstance(loader, Iterator):
        raise TypeError(
            f"pseudo_paths: loader is a {type(loader).__name__}, which can be read once, and thresholds need a first "
            "reading; pass a DataLoader or a list, or thresholds=pseudo_thresholds(...)"
        )


def observable_copy(model: nn.Module, like: nn.Module | None, wrap_options: Mapping[str, Any]) -> nn.Module:
    """A copy with open gates at every site: it computes what the model computes, and its responses can be watched."""
    if isinstance(getattr(model, "decoupling", None), Decoupling):
        raise ValueError(
            f"pseudo_paths: {type(model).__name__} is wrapped and has real paths: decouplify.record reads them. For "
            "pseudo-paths pass the network as it was, or decouplify.unwrap(copy.deepcopy(model))"
        )
    options = dict(wrap_options)
    if like is not None:
        plan = decoupling_of(like, "pseudo_paths(like=...)").plan
        options = {**vars(plan.options), "input_size": plan.input_size}
    # Positive: every gate starts open. No verification: nothing is trusted to the copy but its forward.
    options |= {"bias": 2.0, "verify": False, "frozen_ok": True}
    devices = [device_of(model)] if device_of(model).type == "cuda" else []
    with torch.random.fork_rng(devices):  # controllers draw initial weights; the caller's numbers must not move
        return wrap(copy.deepcopy(model), **options).requires_grad_(False)


class _Gates(nn.Module):
    """A network and, after its forward, what takes the place of gates; the shape in which a recorder wants both."""

    def __init__(self, observed: nn.Module) -> None:
        super().__init__()
        self.observed = observed
        self.last: dict[str, Tensor] = {}

    @property
    def inner(self) -> Decoupling:
        """The gates of the observed copy, all open."""
        decoupling = self.observed.decoupling
        assert isinstance(decoupling, Decoupling)
        return decoupling

    @property
    def plan(self) -> Plan:
        """The sites."""
        return self.inner.plan

    @property
    @abstractmethod
    def notes(self) -> dict[str, Any]:
        """What the manifest says about the rule."""

    def gates(self) -> dict[str, Tensor]:
        """1 where the margin is positive, shape (N, K) by layer."""
        return {name: (margin > 0).float() for name, margin in self.last.items()}

    def margins(self) -> dict[str, Tensor]:
        """How far above the threshold, shape (N, K) by layer."""
        return self.last


class _ResponseGates(_Gates):
    """Open where a filter's pooled response is above its threshold."""

    def __init__(self, observed: nn.Module, thresholds: PseudoThresholds) -> None:
        super().__init__(observed)
        self.thresholds = thresholds
        wanted = {gate.name: gate.n_filters for gate in self.plan.gates}
        given = {name: len(values) for name, values in thresholds.values.items()}
        if given != wanted:
            raise ValueError(
                f"pseudo_paths: thresholds of {len(given)} layers and {sum(given.values())} filters given, this "
                f"{self.plan.model} has {len(wanted)} and {sum(wanted.values())}, and all must be there, with the same "
                "names; compute them with the same model and options"
            )
        device = device_of(observed)
        self._limits = {name: torch.from_numpy(values).to(device) for name, values in thresholds.values.items()}
        self._meant = {gate.name: gate.ends[0] for gate in self.plan.gates}

    @property
    def notes(self) -> dict[str, Any]:
        return {"rule": self.thresholds.rule, "threshold_images": self.thresholds.n_images}

    def forward(self, images: Tensor) -> Any:
        self.last = {}
        with self.inner.observed(self._look):
            return self.observed(images)

    def _look(self, name: str, end: End, features: Tensor) -> None:
        if end != self._meant[name]:  # a gate that several convolutions share is judged by the first of them
            return
        space = (2, 3) if end.axis == 1 else (1, 2)
        response = features.amax(space).float() if self.thresholds.rule == "active" else features.float().mean(space)
        self.last[name] = response - self._limits[name]


class _RoutingGates(_Gates):
    """Open where the critical data routing path has a factor above 0 (Wang et al., CVPR 2018).

    The loss of an image is the cross entropy between the network's own softmax output and that with factors, plus
    ``gamma`` times the sum of the factors. Of all iterates with the same predicted class the one of lowest loss counts.
    Momentum starts at zero for every batch, and images of a batch share nothing: a momentum carried from one image to
    the next would tell them apart by their order.
    """

    def __init__(self, observed: nn.Module, gamma: float, steps: int, lr: float) -> None:
        super().__init__(observed)
        self.gamma, self.steps, self.lr = gamma, steps, lr

    @property
    def notes(self) -> dict[str, Any]:
        return {"rule": "cdrp", "gamma": self.gamma, "steps": self.steps, "lr": self.lr}

    def forward(self, images: Tensor) -> Tensor:
        logits = self.observed(images)
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            raise ValueError("pseudo_paths: the rule 'cdrp' needs a model whose output is (N, classes) logits")
        device = logits.device
        factors = [torch.ones(len(images), gate.n_filters, device=device) for gate in self.plan.gates]
        momentum = [torch.zeros_like(factor) for factor in factors]
        best, lowest = factors, torch.full((len(images),), torch.inf, device=device)
        for _ in range(self.steps):
            loss, same, gradients = self._step(images, logits, factors)
            better = same & (loss < lowest)
            best = [torch.where(better[:, None], new, old) for new, old in zip(factors, best, strict=True)]
            lowest = torch.where(better, loss, lowest)
            momentum = [0.9 * old + new for old, new in zip(momentum, gradients, strict=True)]
            factors = [(f - self.lr * m).clamp(0, 100) for f, m in zip(factors, momentum, strict=True)]
        self.last = {gate.name: factor for gate, factor in zip(self.plan.gates, best, strict=True)}
        return logits

    def _step(self, images: Tensor, logits: Tensor, factors: list[Tensor]) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Loss per image (N,), whether its class is still predicted (N,), and the gradient of each factor."""
        with torch.enable_grad():
            leaves = [factor.detach().requires_grad_() for factor in factors]
            with self.inner.forced({gate.name: leaf for gate, leaf in zip(self.plan.gates, leaves, strict=True)}):
                routed = self.observed(images)
            kept = F.cross_entropy(routed, logits.softmax(1), reduction="none")
            total = torch.stack([leaf.abs().sum(1) for leaf in leaves]).sum(0)
            loss = kept + self.gamma * total
            gradients = torch.autograd.grad(loss.sum(), leaves)
        return loss.detach(), routed.argmax(1) == logits.argmax(1), gradients


def _recorder(
    gates: _Gates,
    loader: Iterable[Any],
    margins: bool,
    max_images: int | None,
    device: str | torch.device | None,
    progress: bool | None,
) -> Recorder:
    return Recorder(
        model=gates,
        decoupling=gates,
        layers=lay_out((gate.name, gate.n_filters) for gate in gates.plan.gates),
        loader=loader,
        device=device_of(gates.observed) if device is None else torch.device(device),
        margins=margins,
        max_images=max_images,
        progress=progress,
        notes={"pseudo": gates.notes},
    )


def _thresholds(
    observed: nn.Module, loader: Iterable[Any], rule: Rule, quantile: float, options: Mapping[str, Any]
) -> PseudoThresholds:
    decoupling = observed.decoupling
    assert isinstance(decoupling, Decoupling)
    none = PseudoThresholds(
        rule, {gate.name: np.zeros(gate.n_filters, np.float32) for gate in decoupling.plan.gates}, 0
    )
    if rule == "active":
        return none
    with tempfile.TemporaryDirectory(prefix="decouplify-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", RunningIdsWarning)  # no image is looked up by its pooled responses
        recorder = _recorder(_ResponseGates(observed, none), loader, margins=True, **options)
        responses = recorder.to_disk(Path(folder) / "responses")
        assert responses.margins is not None
        limits = _column_limits(responses.margins, rule, quantile)
        n_images = len(responses)
    return PseudoThresholds(rule, {name: limits[part] for name, part in responses.filter_slices.items()}, n_images)


def _column_limits(responses: NDArray[np.float16], rule: Rule, quantile: float) -> NDArray[np.float32]:
    """Mean or quantile of every column, a few columns at a time."""
    limits = np.empty(responses.shape[1], np.float32)
    for start in range(0, len(limits), _COLUMNS):
        block = np.asarray(responses[:, start : start + _COLUMNS], np.float32)
        limits[start : start + _COLUMNS] = (
            block.mean(axis=0, dtype=np.float64) if rule == "mean" else np.quantile(block, quantile, axis=0)
        )
    return limits
