"""The three losses that train the gates (paper, section 3.2), and the one object that adds them to a training loop.

The plain functions are the paper's terms for one gate. ``DecouplingLoss`` collects gates and pooled outputs of the last
forward and sums the terms over all gates. Where the terms as printed do not train gates in practice, the default
departs from the paper and ``literal=True`` restores it; each departure is named where it is made.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decouplify.decoupling import Decoupling, Forward, decoupling_of, module_key
from decouplify.errors import NonFiniteError

__all__ = [
    "DecouplingLoss",
    "Terms",
    "fit_head",
    "kl_divergence",
    "mutual_information",
    "parameter_groups",
    "parse_target",
    "sparsity",
]

Target = float | str | Mapping[str, float] | None
ByGates = dict[tuple[str, ...], Tensor]  # values of a term, shape (G,), by the names of their G gates
Key = TypeVar("Key")


def mutual_information(z: Tensor, head: nn.Linear, attribute: Tensor, literal: bool = False) -> Tensor:
    """Cross entropy of telling the attribute from the gates, a bound on ``-I(attribute; z)`` up to a constant (Eq. 9).

    Minimising it over the head makes the bound tight, minimising it over the gates makes them informative. As printed
    both get the gradient times lambda_m, so with lambda_m = 0.01 the head stays at chance for many epochs and tells
    the gates nothing. Default: the *returned value* is that of Eq. 9 and its gradient into z is that of Eq. 9 through a
    frozen head; ``fit_head`` trains the head on detached gates.

    Args:
        z: Gate values of one gate, shape (N, K).
        head: Q, a linear layer from K gates to the values of the attribute.
        attribute: Class indices, shape (N,), or soft labels, shape (N, classes).
        literal: Let the gradient into the head pass as printed.

    Returns:
        Scalar, in nats, mean over images.
    """
    return F.cross_entropy(_tell(z, head, frozen=not literal), attribute)


def fit_head(z: Tensor, head: nn.Linear, attribute: Tensor) -> Tensor:
    """A term of value zero whose gradient trains the head on the gates at the full learning rate."""
    loss = F.cross_entropy(_tell(z.detach(), head), attribute)
    return loss - loss.detach()


def _with_gradient_times(factor: float | Tensor, z: Tensor) -> Tensor:
    """``z`` itself, of which a multiple of the gradient arrives."""
    constant = z.detach()
    return constant + factor * (z - constant)


def _tell(z: Tensor, head: nn.Linear, frozen: bool = False) -> Tensor:
    """Logits of the attribute, in the precision of the gates also in a model of half precision."""
    tensors = {name: (p.detach() if frozen else p).to(z.dtype) for name, p in head.named_parameters()}
    return F.linear(z, tensors["weight"], tensors.get("bias"))


def kl_divergence(z: Tensor, y: Tensor, literal: bool = False) -> Tensor:
    """KL divergence of the selection from the responses, ``KL(z || y)`` (Eq. 10).

    Neither is a distribution as printed; both are divided by their sum. With the gradient into z the term opens every
    gate (an all-open z is closest to any spread-out y), so by default it only shapes the responses: filters that are
    selected shall respond.

    Args:
        z: Gate values, shape (N, K), in [0, 1]; of several gates with equally many filters, (G, N, K).
        y: Mean response per filter before gating, of the same shape, >= 0.
        literal: Let the gradient into z pass, as printed.

    Returns:
        Scalar >= 0, or (G,), in nats, mean over images. Images with all gates closed contribute 0.
    """
    eps = 1e-6
    z = z if literal else z.detach()
    n_open = z.sum(-1, keepdim=True)
    # Where nothing is open there is no distribution, and next to it the gradient would have no bound; nor has that of
    # p log p at a closed gate without eps.
    p = torch.where(n_open <= eps, 0.0, z / n_open.clamp_min(eps))
    q = (y + eps) / (y + eps).sum(-1, keepdim=True)
    return (p * ((p + eps).log() - q.log())).sum(-1).mean(-1)


def _of_one_width(tensors: Mapping[Key, Tensor]) -> list[tuple[Key, ...]]:
    """The keys of tensors (N, K), put together where K is the same.

    What is then computed for all of them at once would take thousands of small kernels per step one by one, which on a
    GPU cost more time than the network itself.
    """
    widths: dict[torch.Size, list[Key]] = {}
    for key, tensor in tensors.items():
        widths.setdefault(tensor.shape, []).append(key)
    return [tuple(keys) for keys in widths.values()]


def _tell_all(z: Tensor, heads: Sequence[nn.Linear]) -> Tensor:
    """Logits of the attribute from several gates, each by its own head: (G, N, K) to (G, N, classes)."""
    weights = torch.stack([head.weight for head in heads]).to(z.dtype)
    biases = torch.stack([head.bias for head in heads]).to(z.dtype)
    return torch.baddbmm(biases[:, None], z, weights.mT)


def _one_by_one(terms: Mapping[str, ByGates], order: Iterable[str]) -> dict[str, dict[str, Tensor]]:
    """Terms by gate in the order of the gates, detached; of a gate with several ends their sum."""
    return {term: _by_gate(groups, order) for term, groups in terms.items()}


def _by_gate(groups: ByGates, order: Iterable[str]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for names, stacked in groups.items():
        for name, value in zip(names, stacked.detach().reshape(-1), strict=True):
            found[name] = found[name] + value if name in found else value
    return {name: found[name] for name in order if name in found}


def sparsity(z: Tensor, keep_ratio: float | Tensor = 0.0, literal: bool = False) -> Tensor:
    """Distance of the number of open filters from its target, ``| mean ||z||_1 - R K |`` (Eq. 11).

    Printed without the absolute value, R would be a constant without effect on the gradient. The mean over images
    comes first, so that images may differ as long as the average fits.

    Args:
        z: Gate values, shape (N, K), in [0, 1].
        keep_ratio: R, target share of open filters, in [0, 1].
        literal: ``||z||_1 - R K`` as printed.

    Returns:
        Scalar, in filters.
    """
    deviation = z.sum(1).mean() - keep_ratio * z.shape[1]
    return deviation if literal else deviation.abs()


def parse_target(target: Target) -> tuple[float | None, Mapping[str, float] | None]:
    """Read a target as (share of MACs, None), (None, keep ratio by glob), or (None, None).

    Raises:
        ValueError: If it is neither a keep ratio in (0, 1], a MAC reduction such as "2.0x", nor a mapping of them.
    """
    if target is None:
        return None, None
    if isinstance(target, str):
        try:
            reduction = float(target.removesuffix("x"))
        except ValueError:
            reduction = 0.0
        if not target.endswith("x") or not 1 <= reduction < math.inf:
            raise ValueError(f'target={target!r}: a MAC reduction is written like "2.0x" and is at least "1x"')
        return 1 / reduction, None
    ratios = target if isinstance(target, Mapping) else {"*": target}
    for pattern, ratio in ratios.items():
        if not 0 <= float(ratio) <= 1:
            which = f" for {pattern!r}" if isinstance(target, Mapping) else ""
            raise ValueError(
                f"target={target!r}: the keep ratio {ratio!r}{which} is not in [0, 1]; for a MAC reduction give a "
                'string such as "2.0x"'
            )
    return None, dict(ratios)


def _one_target(target: Target, target_macs: float | None) -> tuple[float | None, Mapping[str, float] | None]:
    """What ``parse_target`` returns, for a target given in one of two ways."""
    if target_macs is None:
        return parse_target(target)
    if target is not None:
        raise ValueError(f"DecouplingLoss: target={target!r} and target_macs={target_macs} given; one of them wanted")
    if not 0 < target_macs <= 1:
        raise ValueError(f"DecouplingLoss: target_macs={target_macs}; a share of the dense MACs in (0, 1] wanted")
    return float(target_macs), None


@dataclass(frozen=True)
class Terms:
    """The terms of one step, unweighted and detached.

    Attributes:
        mutual_information: Sum over gates, in nats.
        kl: Sum over gates, in nats.
        sparsity: Distance from the target: of MACs relative to it, otherwise in filters, see ``DecouplingLoss``.
        keep_ratio: Open gates / gates of this batch.
        macs: Executed / dense multiply-accumulates of this batch, NaN unless the target is a MAC reduction.
        by_gate: Term name to gate name to value, empty unless ``per_gate=True``.
    """

    mutual_information: Tensor
    kl: Tensor
    sparsity: Tensor
    keep_ratio: Tensor
    macs: Tensor
    by_gate: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)


class DecouplingLoss:
    """The loss that is added to the task's own: call it with the labels after each forward in training mode.

        criterion = DecouplingLoss(model, target="2.0x")
        loss = F.cross_entropy(model(images), labels) + criterion(labels)

    The value is ``lambda_m MI + lambda_k KL + lambda_s Sparse`` (Eq. 12 without the task's cross entropy), each summed
    over gates and averaged over images.

    Departures from the paper, undone by ``literal=True``: the heads of the MI term learn at the full rate, not
    at lambda_m times it; the KL term's gradient does not enter the gates; the target is a deviation in absolute value.
    The default weights are those that select filters per image in schedules of tens of epochs. The paper's are
    ``mutual_information=0.01, kl=1.0, sparsity=1.5e-4, literal=True`` (CIFAR-10, ResNet-56, 200 epochs).

    Args:
        model: A wrapped model, or one in DistributedDataParallel or torch.compile.
        mutual_information: lambda_m; 0 switches the term off.
        kl: lambda_k; 0 switches the term off and saves the pooling of outputs.
        sparsity: lambda_s per filter; 0 switches the term off. A target in MACs has its own weight, ``steering``.
        target: What the sparse term aims at. None: as few open filters as the other terms let it (R = 0). A number or a
            mapping of gate globs to numbers: the keep ratio R of every gate. A string such as "2.0x": a reduction of
            executed MACs; the term is then the relative deviation of MACs, its value taken from noise-free gates and
            its gradient from the training gates.
        target_macs: A target in MACs as the share that is left, in (0, 1]: 0.5 means the same as ``target="2.0x"``.
        steering: Weight of a target in MACs, in nats for missing it by its whole size.
        literal: The paper's terms as printed.
        per_gate: Fill ``terms.by_gate``.
        check_finite: Raise when the loss is not finite. Costs one synchronisation per step on a GPU.

    Attributes:
        terms: ``Terms`` of the last call, None before.
        target_scale: How far on the way from open gates to the target the sparse term asks to be, in [0, 1]. Raise it
            over the first third of training. A number, or a tensor of no dimensions.
        information_scale: Factor on lambda_m and lambda_k, for ramps; likewise.

    Raises:
        ValueError: If the model is not wrapped, a weight is negative, or the target cannot be read.
    """

    def __init__(
        self,
        model: nn.Module,
        mutual_information: float = 0.03,
        kl: float = 0.01,
        sparsity: float = 1e-3,
        target: Target = None,
        *,
        target_macs: float | None = None,
        steering: float = 2.0,
        literal: bool = False,
        per_gate: bool = False,
        check_finite: bool = True,
    ) -> None:
        weights = {"mutual_information": mutual_information, "kl": kl, "sparsity": sparsity, "steering": steering}
        for name, weight in weights.items():
            if not weight >= 0:
                raise ValueError(f"DecouplingLoss: {name}={weight} must be a number >= 0")
        self._decoupling = decoupling_of(model, "DecouplingLoss")
        self.mutual_information, self.kl, self.sparsity, self.steering = mutual_information, kl, sparsity, steering
        self.literal, self.per_gate, self.check_finite = literal, per_gate, check_finite
        self.target_macs, self._ratios = _one_target(target, target_macs)
        self.target_scale: float | Tensor = 1.0
        self.information_scale: float | Tensor = 1.0
        self.terms: Terms | None = None
        self._decoupling.collects_outputs = kl > 0
        if mutual_information > 0 and self._decoupling.n_classes is None:
            raise ValueError(
                "DecouplingLoss: the model does not output (N, classes), so there are no heads for the "
                "mutual-information term; say wrap(model, n_classes=...) or mutual_information=0"
            )
        self._check_globs()

    def __call__(self, labels: Tensor | None = None) -> Tensor:
        """The weighted sum of the terms for the last forward, which is then forgotten.

        Args:
            labels: Class indices (N,), soft labels (N, classes), or any other discrete attribute with at most
                ``n_classes`` values. Only the mutual-information term needs them.

        Returns:
            Scalar with a gradient into controllers, heads and features; its attribute ``terms`` holds what
            ``self.terms`` does.

        Raises:
            RuntimeError: If there was no forward in training mode since the last call, or no gate has a gradient.
            ValueError: If the labels do not fit the forward or the heads.
            NonFiniteError: If a term is NaN or infinite.
        """
        forward = self._decoupling.last_forward()
        self._check_forward(forward)
        gates = self._decoupling.gates()
        self._check_labels(labels, len(next(iter(gates.values()))))
        path = self._decoupling.path()
        terms = {
            "mutual_information": self._mutual_information(gates, labels),
            "kl": self._kl(forward) if self.kl > 0 else {},
        }
        macs = self._macs(forward, path) if self.target_macs is not None else None
        if macs is None:
            terms["sparsity"] = self._sparsity(gates)
        self._decoupling.drop_forward()
        return self._total(terms, gates, path, macs)

    def _total(self, terms: dict[str, ByGates], gates: dict[str, Tensor], path: Tensor, macs: Tensor | None) -> Tensor:
        zero = path.new_zeros(())
        sums = {name: sum((values.sum() for values in term.values()), zero) for name, term in terms.items()}
        if macs is not None:
            sums["sparsity"] = self._deviation(macs)
        total = self._weighted_information(sums["mutual_information"])
        total = total + self.information_scale * self.kl * sums["kl"]
        total = total + (self.sparsity if macs is None else self.steering) * sums["sparsity"]
        if self.check_finite and not bool(total.isfinite()):
            raise NonFiniteError(self._describe_non_finite(_one_by_one(terms, gates), gates))
        self.terms = Terms(
            **{name: value.detach() for name, value in sums.items()},
            keep_ratio=path.detach().mean(),
            macs=torch.full_like(zero, math.nan) if macs is None else macs.detach(),
            by_gate=_one_by_one(terms, gates) if self.per_gate else {},
        )
        total.terms = self.terms  # type: ignore[attr-defined]  # for who keeps the criterion's value apart from the sum
        return total

    def _mutual_information(self, gates: dict[str, Tensor], labels: Tensor | None) -> ByGates:
        """The term of each gate; unless literal, its gradient is that into the head and the weighted one into z."""
        if self.mutual_information == 0 or labels is None:
            return {}
        # As lambda_m mutual_information + fit_head, but for many classes the heads' products take a while: once, then.
        weight = 1.0 if self.literal else self._weight_of_information
        terms: ByGates = {}
        for names in _of_one_width(gates):
            z = torch.stack([gates[name] for name in names])
            told = _tell_all(_with_gradient_times(weight, z), [self._head(name) for name in names])
            attributes = labels.repeat(len(names), *(1 for _ in labels.shape[1:]))
            losses = F.cross_entropy(told.flatten(0, 1), attributes, reduction="none")
            terms[names] = losses.unflatten(0, told.shape[:2]).mean(1)
        return terms

    @property
    def _weight_of_information(self) -> float | Tensor:
        return self.mutual_information * self.information_scale

    def _weighted_information(self, term: Tensor) -> Tensor:
        """The weighted value, with the gradients that ``_mutual_information`` prepared."""
        weight = self._weight_of_information
        return weight * term if self.literal else weight * term.detach() + (term - term.detach())

    def _kl(self, forward: Forward) -> ByGates:
        terms: ByGates = {}
        for ends in _of_one_width(forward.pooled):
            names = tuple(name for name, _ in ends)
            z = torch.stack([forward.gates[name] for name in names])
            terms[names] = kl_divergence(z, torch.stack([forward.pooled[end] for end in ends]), self.literal)
        return terms

    def _sparsity(self, gates: dict[str, Tensor]) -> ByGates:
        if self._ratios is None:  # with R = 0 there is no way to go half of, so the term itself is scaled
            return {(name,): self.target_scale * sparsity(z, 0.0, self.literal) for name, z in gates.items()}
        return {(name,): sparsity(z, 1 + self.target_scale * (self._keep_ratio(name) - 1)) for name, z in gates.items()}

    def _keep_ratio(self, name: str) -> float:
        ratios = self._ratios or {}
        return next((float(r) for pattern, r in ratios.items() if fnmatch.fnmatch(name, pattern)), 0.0)

    def _macs(self, forward: Forward, path: Tensor) -> Tensor:
        """Executed / dense MACs, mean over images: value from noise-free gates, gradient from training gates.

        Noise makes training gates close or open where evaluation would not; steering by them misses the target.
        """
        costs = self._decoupling.costs
        soft = costs.executed(path).mean() / costs.n_dense
        with torch.no_grad():
            logits = torch.cat([forward.logits[gate.name] for gate in self._decoupling.plan.gates], 1)
            hard = costs.executed((logits > 0).float()).mean() / costs.n_dense
        return soft + (hard - soft).detach()

    def _deviation(self, macs: Tensor) -> Tensor:
        """Relative distance from the target, or from the point on the way to it."""
        assert self.target_macs is not None
        return (macs / (1 + self.target_scale * (self.target_macs - 1)) - 1).abs()

    def _head(self, name: str) -> nn.Linear:
        head = self._decoupling.heads[module_key(name)]
        assert isinstance(head, nn.Linear)
        return head

    def _check_globs(self) -> None:
        names = [gate.name for gate in self._decoupling.plan.gates]
        for pattern in self._ratios or {}:
            if not fnmatch.filter(names, pattern):
                raise ValueError(
                    f"DecouplingLoss: target for {pattern!r} matches no gate; the gates are {', '.join(names)}"
                )

    def _check_forward(self, forward: Forward) -> None:
        plan = self._decoupling.plan
        if not forward.gates:
            raise RuntimeError(
                "DecouplingLoss: no forward to judge. Call model(images) before criterion(labels), once per call and "
                "in the same thread."
            )
        if not forward.training:
            raise RuntimeError("DecouplingLoss: the model was in eval mode; call model.train() before the forward")
        missing = [gate.name for gate in plan.gates if gate.name not in forward.gates]
        if missing:
            raise RuntimeError(
                f"DecouplingLoss: the last forward did not reach {len(missing)} of {len(plan.gates)} gates (first: "
                f"{missing[0]}); run the whole model"
            )
        if not any(z.requires_grad for z in forward.gates.values()):
            raise RuntimeError(
                "DecouplingLoss: no gate has a gradient. The forward ran under no_grad (or reentrant checkpointing), "
                "or the controllers are frozen; call model.decoupling.requires_grad_(True)."
            )

    def _check_labels(self, labels: Tensor | None, n_images: int) -> None:
        if self.mutual_information == 0:
            return
        n_classes = self._decoupling.n_classes
        if not isinstance(labels, Tensor):
            raise ValueError(f"DecouplingLoss: labels {labels!r} given; a tensor (N,) or (N, {n_classes}) wanted")
        if len(labels) != n_images or labels.dim() not in (1, 2):
            raise ValueError(
                f"DecouplingLoss: labels of shape {tuple(labels.shape)} given for a forward of {n_images} images; "
                f"({n_images},) or ({n_images}, {n_classes}) wanted"
            )
        if labels.dim() == 2 and labels.shape[1] != n_classes:
            raise ValueError(f"DecouplingLoss: soft labels for {labels.shape[1]} classes, heads for {n_classes}")
        if labels.dim() == 1 and labels.is_floating_point():
            raise ValueError("DecouplingLoss: labels (N,) must be integer class indices; cast them with labels.long()")
        if labels.dim() == 1 and self.check_finite and not bool(((labels >= 0) & (labels < (n_classes or 0))).all()):
            raise ValueError(
                f"DecouplingLoss: labels from {int(labels.min())} to {int(labels.max())} given, the heads know 0 to "
                f"{(n_classes or 0) - 1}; for another attribute say wrap(model, n_classes=...)"
            )

    @staticmethod
    def _describe_non_finite(by_gate: dict[str, dict[str, Tensor]], gates: dict[str, Tensor]) -> str:
        bad_gates = [name for name, z in gates.items() if not bool(z.isfinite().all())]
        bad_terms = [f"{term} of {n}" for term, vs in by_gate.items() for n, v in vs.items() if not bool(v.isfinite())]
        where = (
            f"the gates of {bad_gates[0]} are not finite" if bad_gates else f"first in {(bad_terms or ['the MACs'])[0]}"
        )
        return (
            f"DecouplingLoss: the loss is not finite; {where}. Look for NaN or infinity in the images, or lower the "
            "learning rate."
        )


def parameter_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float = 0.0,
    gate_lr: float | None = None,
    head_lr: float | None = None,
) -> list[dict[str, Any]]:
    """Optimiser groups: the network, the controllers, and the heads, each at a learning rate of its own.

    Args:
        model: A wrapped model.
        lr: Learning rate of the network.
        weight_decay: Weight decay of the network. The others have none: it would pull logits to the threshold.
        gate_lr: Learning rate of controllers, by default 10 ``lr``, the change that helped most in practice.
        head_lr: Learning rate of the mutual-information loss's heads, by default ``lr``: at the rate of controllers
            these linear classifiers overshoot, and drag the gates along.

    Returns:
        Three groups for any torch optimiser, every trainable parameter in exactly one; fewer if one would be empty.
    """
    decoupling: Decoupling = decoupling_of(model, "parameter_groups")
    ours = {id(p) for p in decoupling.parameters()}
    network = [p for p in model.parameters() if id(p) not in ours]
    groups: list[dict[str, Any]] = [
        {"params": network, "lr": lr, "weight_decay": weight_decay},
        {
            "params": list(decoupling.controllers.parameters()),
            "lr": 10 * lr if gate_lr is None else gate_lr,
            "weight_decay": 0.0,
        },
        {"params": list(decoupling.heads.parameters()), "lr": lr if head_lr is None else head_lr, "weight_decay": 0.0},
    ]
    trainable = [{**group, "params": [p for p in group["params"] if p.requires_grad]} for group in groups]
    return [group for group in trainable if group["params"]]
