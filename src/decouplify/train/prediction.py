"""Controllers that start as predictors: what each filter is worth for an image, from what the controller sees of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from decouplify.controller import ArchitectureController, pooled
from decouplify.decoupling import Decoupling, decoupling_of, module_key, network_of
from decouplify.errors import NonFiniteError
from decouplify.modes import eval_mode
from decouplify.plan import End, Gate
from decouplify.train.batches import Batch
from decouplify.train.importance import PER_NEPER, log_worth

__all__ = ["predict_worth"]

_LEAST_WORTH = -60.0  # nepers, of filters that no answer depends on
_HELD_OUT = 4  # one of so many images says when a fit stops
_MOST_ENERGY = 30.0  # times the mean over images; more would decide a fit alone
_LOWEST, _HIGHEST = -8.0, 5.0  # nepers, of a prediction during its fit
_STEPS, _EVERY, _PATIENCE = 300, 10, 60  # of a fit: at most, between judgements, without progress
_BATCH, _LR = 400, 3e-3
_LINEAR_FOR = 3.0  # standard deviations below the mean in which hidden units begin as linear
_LEAST_SPREAD = 1e-3  # relative to what inputs of variance 1 would do; what varies less is rounding
_NEWTON_STEPS, _RIDGE, _OUTLYING = 25, 0.02, 4.0  # ridge per image, of slopes; standard deviations
_N_COUNTED, _N_HALVINGS = 256, 30  # images, and steps, of the search for the threshold
_CLOSED = -8.0  # logits of filters that no image opens: training hardly moves them, and thresholds move by less


@dataclass(frozen=True)
class _Seen:
    """One gate over all views of all images.

    Attributes:
        s: What its controller pools, shape (N, C).
        energy: Mean square over positions of the features that it multiplies last, shape (N, K).
        held_out: Which of them belong to images that only judge a fit, shape (N,).
    """

    s: Tensor
    energy: Tensor
    held_out: Tensor


def predict_worth(
    model: nn.Module,
    views: Iterable[Iterable[Batch]],
    important: Mapping[str, Tensor],
    target_macs: float,
    closed: Mapping[str, Tensor] | None = None,
) -> None:
    """Fit all controllers so that each image starts with the filters that are worth most for it.

    What the answers lose if a gate closes grows with the square of what it multiplies. So with the importance F_k of
    filter k, its energy e_ik in image i and the mean e_k over images, the filter is worth ``F_k e_ik / e_k`` for the
    image. Of that a controller can know the mean, given its pooled input s: ``g = log E[e_ik / e_k | s]``, which
    minimises the mean of ``exp(g) - g e_ik / e_k`` (Poisson regression). A constant g is 0, the importance alone; how
    far a fit goes beyond, images held out decide. To g the logarithm of F_k per multiply-accumulate that closing the
    filter saves is added, and one threshold for all gates subtracted.

    Args:
        model: A wrapped model whose controllers are new; nothing but these changes.
        views: Passes over the same images in the same order, for instance as they are and three times augmented; of
            batches (N, C, H, W) and labels (not used). Several hundred images or more; of several processes, those of
            all count.
        important: See ``importance``.
        target_macs: Share of the dense MACs that shall be executed, in (0, 1]. It is met as long as closed gates do not
            change what later controllers see; ``calibrate`` does the rest.
        closed: By gate, which filters are closed for all images and stay so, booleans of shape (K,), as
            ``close_in_rounds`` has them; the others are judged without these. None: each image may open all.

    Raises:
        ValueError: If the model is not wrapped, there are fewer than 4 images, the target is not in (0, 1], or
            ``closed`` does not fit the gates.
        NonFiniteError: If the network returns infinite or undefined features.
    """
    if not 0 < target_macs <= 1:
        raise ValueError(f"predict_worth: target_macs={target_macs}; a share of the dense MACs in (0, 1] wanted")
    decoupling = decoupling_of(model, "predict_worth")
    gates = decoupling.plan.gates
    may_open = _may_open(decoupling, closed or {})
    seen = _look(model, decoupling, views, may_open)
    for gate in gates:
        _check_finite(gate, seen[gate.name])
    for gate in gates:
        _fit(_controller(decoupling, gate), _of_inputs(model, gate), seen[gate.name])
    mean_worth = log_worth(decoupling, important, torch.cat(list(may_open.values())))
    _compare(decoupling, seen, mean_worth.clamp(min=_LEAST_WORTH), may_open, target_macs)


def _may_open(decoupling: Decoupling, closed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By gate, which filters some image may open, booleans of shape (K,)."""
    none = {gate.name: torch.zeros(gate.n_filters, dtype=torch.bool) for gate in decoupling.plan.gates}
    for name, mask in closed.items():
        if name not in none:
            raise ValueError(f"predict_worth: closed has {name!r}, which is no gate; the gates are {', '.join(none)}")
        if mask.shape != none[name].shape or mask.dtype != torch.bool:
            raise ValueError(
                f"predict_worth: closed[{name!r}] is {mask.dtype} of shape {tuple(mask.shape)}; booleans of shape "
                f"({len(none[name])},) wanted"
            )
    return {name: ~closed.get(name, nothing).cpu() for name, nothing in none.items()}


@torch.no_grad()
def _look(
    model: nn.Module, decoupling: Decoupling, views: Iterable[Iterable[Batch]], may_open: Mapping[str, Tensor]
) -> dict[str, _Seen]:
    """What there is to learn from, with all gates open that may be."""
    gates = decoupling.plan.gates
    last = {gate.name: gate.ends[-1] for gate in gates}
    inputs: dict[str, list[Tensor]] = {gate.name: [] for gate in gates}
    energies: dict[str, list[Tensor]] = {gate.name: [] for gate in gates}
    held_out: list[Tensor] = []

    def remember_input(gate: Gate) -> Callable[[nn.Module, tuple[Tensor]], None]:
        return lambda _, args: inputs[gate.name].append(pooled(args[0], gate.input_axis))

    def remember_energy(name: str, end: End, features: Tensor) -> None:
        if end == last[name]:
            energies[name].append(pooled(features.float().square(), end.axis))

    with eval_mode(model), decoupling.observed(remember_energy), ExitStack() as hooks:
        for gate in gates:
            hook = _controller(decoupling, gate).register_forward_pre_hook(remember_input(gate))
            hooks.callback(hook.remove)
        hooks.enter_context(decoupling.forced({name: mask.float() for name, mask in may_open.items()}))
        for view in views:
            n_images = 0
            for x, _ in view:
                model(x)
                n_images += len(x)
            held_out.append(torch.arange(n_images) % _HELD_OUT == _HELD_OUT - 1)
    if not any(part.any() for part in held_out):
        raise ValueError(f"predict_worth: fewer than {_HELD_OUT} images given; a few hundred wanted")
    judges = _of_all_processes(held_out)
    return {
        name: _Seen(_of_all_processes(parts), _of_all_processes(energies[name]), judges)
        for name, parts in inputs.items()
    }


def _of_all_processes(parts: list[Tensor]) -> Tensor:
    """One after another, so that all processes fit the same controllers."""
    here = torch.cat(parts)
    if not dist.is_initialized():
        return here
    everywhere: list[Tensor] = [here] * dist.get_world_size()
    dist.all_gather_object(everywhere, here.cpu())
    return torch.cat([part.to(here.device) for part in everywhere])


def _check_finite(gate: Gate, seen: _Seen) -> None:
    if not (bool(seen.s.isfinite().all()) and bool(seen.energy.isfinite().all())):
        raise NonFiniteError(
            f"predict_worth: the features around gate {gate.name!r} are not finite with all gates open; look for NaN "
            "or infinity in the images or the weights"
        )


def _fit(controller: ArchitectureController, of_inputs: Tensor, seen: _Seen) -> None:
    """``g = log E[e_ik / e_k | s]``, as far as that helps images held out.

    Args:
        controller: Gets the fit.
        of_inputs: What a constant input of one in each channel makes of each filter, shape (C, K).
        seen: What to fit to.
    """
    mean = seen.energy.mean(0)
    y = (seen.energy / torch.where(mean > 0, mean, 1.0)).clamp(max=_MOST_ENERGY)
    y[:, mean == 0] = 1.0
    center, scale = seen.s.mean(0), seen.s.var(0).add(1e-5).rsqrt()
    x, of_inputs = (seen.s - center) * scale, of_inputs / scale[:, None]
    held_out = seen.held_out.to(x.device)
    layers = _Layers(controller, of_inputs)
    n_steps = layers.steps_that_help(x[~held_out], y[~held_out], x[held_out], y[held_out])
    layers.train_for(x, y, n_steps)
    layers.put_into(controller, center, scale)


@torch.no_grad()
def _of_inputs(model: nn.Module, gate: Gate) -> Tensor:
    """What a constant input of one in each channel makes of each filter, but for borders and bias, shape (C, K).

    Zeros where the module has no weight of its convolution under that name.
    """
    decoupling = decoupling_of(model)
    groups = next(site.groups for site in decoupling.plan.sites if site.name == gate.name)
    weight = getattr(network_of(model).get_submodule(gate.name), "weight", None)
    shape = (gate.n_filters, gate.n_inputs // groups)
    if not isinstance(weight, Tensor) or weight.shape[:2] != shape:
        return torch.zeros(gate.n_inputs, gate.n_filters, device=_controller(decoupling, gate).fc1.weight.device)
    taps = weight.float().reshape(*shape, -1).sum(2)
    return torch.block_diag(*(part.T for part in taps.chunk(groups)))


class _Layers(nn.Module):
    """The layers of a controller, on normalised inputs."""

    def __init__(self, controller: ArchitectureController, of_inputs: Tensor) -> None:
        super().__init__()
        self._of_inputs = of_inputs
        self.fc1 = nn.Linear(controller.fc1.in_features, controller.fc1.out_features, device=of_inputs.device)
        self.fc2 = nn.Linear(controller.fc2.in_features, controller.fc2.out_features, device=of_inputs.device)

    def forward(self, x: Tensor) -> Tensor:
        g: Tensor = self.fc2(torch.relu(self.fc1(x)))
        return g.clamp(_LOWEST, _HIGHEST)

    def steps_that_help(self, x: Tensor, y: Tensor, unseen_x: Tensor, unseen_y: Tensor) -> int | None:
        """After how many steps images that the fit does not see are predicted best; None: a constant does better."""
        best, n_best = float(_deviance(torch.zeros_like(unseen_y), unseen_y)), None
        for n, _ in enumerate(self._steps(x, y, _STEPS)):
            if n % _EVERY == 0:
                with torch.no_grad():
                    error = float(_deviance(self(unseen_x), unseen_y))
                if error < best:
                    best, n_best = error, n
                elif n - (n_best or 0) >= _PATIENCE:
                    break
        return n_best

    def train_for(self, x: Tensor, y: Tensor, n_steps: int | None) -> None:
        """As many steps from the start; None: g = 0 for all."""
        for _ in self._steps(x, y, n_steps or 0):
            pass
        if n_steps is None:
            nn.init.zeros_(self.fc2.weight)
            nn.init.zeros_(self.fc2.bias)

    def _steps(self, x: Tensor, y: Tensor, n_steps: int) -> Iterator[None]:
        """From the same start in the same order; comes back before each step and after the last."""
        generator = torch.Generator().manual_seed(0)
        self._begin(x, y, generator)
        optimizer = torch.optim.Adam(self.parameters(), lr=_LR)
        for _ in range(n_steps):
            yield
            chosen = torch.randint(len(x), (_BATCH,), generator=generator).to(x.device)
            with torch.enable_grad():
                loss = _deviance(self(x[chosen]), y[chosen])
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
        yield

    @torch.no_grad()
    def _begin(self, x: Tensor, y: Tensor, generator: torch.Generator) -> None:
        """From what the convolution itself makes of a constant input with the image's means, as far as that tells y.

        Of these K numbers each gives one prediction, ``g_k = a_k u_k + c_k``. The hidden units are the combinations of
        inputs that return all of them with the least error; what is left of the units is random and without effect.
        """
        u = x @ self._of_inputs
        spread = u.std(0).clamp(min=1e-9).maximum(_LEAST_SPREAD * self._of_inputs.norm(dim=0))
        a, c = _slopes_and_levels(u / spread, y)
        linear = self._of_inputs * (a / spread)
        # The right singular vectors of x @ linear, from a smaller matrix.
        found = torch.linalg.svd(torch.linalg.qr(x, mode="r").R @ linear, full_matrices=False).Vh
        back = found[: self.fc1.out_features].T
        forth = linear @ back
        size = (x @ forth).std(0).clamp(min=1e-9).maximum(_LEAST_SPREAD * forth.norm(dim=0))
        self.fc1.weight.copy_(torch.randn(self.fc1.weight.shape, generator=generator) * (2 / x.shape[1]) ** 0.5)
        for parameter in (self.fc1.bias, self.fc2.weight, self.fc2.bias):
            parameter.zero_()
        n = back.shape[1]
        self.fc1.weight[:n] = (forth / size).T
        self.fc1.bias[:n] = _LINEAR_FOR
        self.fc2.weight[:, :n] = back * size
        self.fc2.bias.copy_(c - _LINEAR_FOR * self.fc2.weight[:, :n].sum(1))

    @torch.no_grad()
    def put_into(self, controller: ArchitectureController, center: Tensor, scale: Tensor) -> None:
        """Give a controller these layers, and the normalisation to its norm or, without one, to its first layer."""
        weight, bias = self.fc1.weight.detach(), self.fc1.bias.detach()
        if controller.norm is None:
            weight = weight * scale
            bias = bias - weight @ center
        else:
            assert controller.norm.running_mean is not None
            assert controller.norm.running_var is not None
            controller.norm.running_mean.copy_(center)
            controller.norm.running_var.copy_(scale.square().reciprocal() - controller.norm.eps)
        controller.fc1.weight.copy_(weight)
        controller.fc1.bias.copy_(bias)
        controller.fc2.weight.copy_(self.fc2.weight)
        controller.fc2.bias.copy_(self.fc2.bias)


def _slopes_and_levels(u: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """For each filter the a and c of ``E[y | u] = exp(a u + c)``, shapes (K,), by Newton's method; small a preferred.

    Args:
        u: Of standard deviation 1, shape (N, K).
        y: Of mean 1, shape (N, K).
    """
    n = len(u)
    u, y = u.double().clamp(-_OUTLYING, _OUTLYING), y.double()
    a = torch.zeros(u.shape[1], dtype=torch.double, device=u.device)
    c = torch.zeros_like(a)
    for _ in range(_NEWTON_STEPS):
        expected = (a * u + c).clamp(_LOWEST, _HIGHEST).exp()
        of_c, of_a = (y - expected).sum(0), ((y - expected) * u).sum(0) - _RIDGE * n * a
        cc, ca, aa = expected.sum(0) + 1e-3 * n, (expected * u).sum(0), (expected * u * u).sum(0) + _RIDGE * n
        determinant = cc * aa - ca.square()
        c = c + ((aa * of_c - ca * of_a) / determinant).clamp(-1, 1)
        a = a + ((cc * of_a - ca * of_c) / determinant).clamp(-1, 1)
    return a.float(), c.float()


def _deviance(g: Tensor, y: Tensor) -> Tensor:
    """Half of that of Poisson regression, but for what g does not change: least where exp(g) is the mean of y."""
    return (g.exp() - y * g).mean()


@torch.no_grad()
def _compare(
    decoupling: Decoupling,
    seen: Mapping[str, _Seen],
    mean_worth: Tensor,
    may_open: Mapping[str, Tensor],
    target_macs: float,
) -> None:
    """Turn predictions into logits: add what a filter is worth in the mean, subtract the threshold of all gates."""
    gates = decoupling.plan.gates
    chosen = _spread(len(seen[gates[0].name].s))
    logits = []
    for gate, part in zip(gates, mean_worth.split([gate.n_filters for gate in gates]), strict=True):
        controller = _controller(decoupling, gate)
        controller.fc2.bias += part.to(controller.fc2.bias)
        with eval_mode(controller):
            logits.append(controller.decide(seen[gate.name].s[chosen]).cpu())
    threshold = _threshold(decoupling, torch.cat(logits, 1), torch.cat(list(may_open.values())), target_macs)
    for gate in gates:
        fc2, closed = _controller(decoupling, gate).fc2, ~may_open[gate.name]
        fc2.bias.sub_(threshold).mul_(PER_NEPER)
        fc2.weight.mul_(PER_NEPER)
        fc2.bias[closed], fc2.weight[closed] = _CLOSED, 0.0


def _spread(n: int) -> Tensor:
    """Which of n views the threshold is searched on."""
    return torch.linspace(0, n - 1, min(n, _N_COUNTED)).long()


def _threshold(decoupling: Decoupling, logits: Tensor, may_open: Tensor, target_macs: float) -> float:
    """The least above which gates execute at most so much, mean over images; the highest logit if none does."""
    low, high = float(logits.min()) - 1, float(logits.max())
    for _ in range(_N_HALVINGS):
        middle = (low + high) / 2
        is_open = (logits > middle) & may_open
        share = float(decoupling.costs.executed(is_open.double()).mean()) / decoupling.costs.n_dense
        low, high = (low, middle) if share <= target_macs else (middle, high)
    return high


def _controller(decoupling: Decoupling, gate: Gate) -> ArchitectureController:
    found = decoupling.controllers[module_key(gate.name)]
    assert isinstance(found, ArchitectureController)
    return found
