"""Switch filters by hand and see what the network answers: what a path does, where statistics say what it goes with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from decouplify._optional import new_axes, write_title
from decouplify.decoupling import Decoupling, decoupling_of, module_key
from decouplify.modes import eval_mode
from decouplify.paths._results import Result
from decouplify.paths._text import percent, plain, text_table
from decouplify.paths.pathset import PathSet
from decouplify.plan import Gate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["GateEffect", "force", "gate_effect", "transplant"]

Filters: TypeAlias = Sequence[int] | NDArray[Any] | Literal["all"]

_N_SHOWN = 10  # classes in tables and pictures


@contextmanager
def force(model: nn.Module, site: str, *, on: Filters = (), off: Filters = ()) -> Iterator[None]:
    """While the context lasts, some filters of a site are open or closed for every image; the others go on deciding.

    It acts before the threshold, so gates, margins, recorded paths and everything downstream follow. Contexts can be
    nested; of two that name the same filter the inner one wins.

    Args:
        model: A wrapped model.
        site: Name of a gated convolution. Sites that share a gate are switched together.
        on: Filters to open: indices, a boolean mask of shape (K,), or ``"all"``.
        off: Filters to close.

    Raises:
        ValueError: If the model is not wrapped, there is no such site or filter, a filter is in both lists, or both are
            empty.

    Examples:
        The first filter of a convolution closed for all images:

        >>> import decouplify, torch
        >>> convs = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3))
        >>> model = decouplify.wrap(convs, (3, 8, 8)).eval()
        >>> with force(model, "2", off=[0]):
        ...     _ = model(torch.zeros(1, 3, 8, 8))
        >>> model.decoupling.path()
        tensor([[0., 1., 1., 1.]])
    """
    decoupling = decoupling_of(model, "force")
    gate = _gate_of(decoupling, site)
    opened, closed = _mask(on, gate, "on"), _mask(off, gate, "off")
    if (opened & closed).any():
        raise ValueError(f"force: filters {_listed(opened & closed)} of {site!r} are in both on and off")
    if not (opened | closed).any():
        raise ValueError(f"force: no filter of {site!r} given; name some with on= or off=")

    def decide(module: nn.Module, args: Any, logits: Tensor) -> Tensor:
        up, down = opened.to(logits.device), closed.to(logits.device)
        return logits.masked_fill(up, torch.inf).masked_fill(down, -torch.inf)

    # The last hook wins, and inner contexts come last.
    handle = decoupling.controllers[module_key(gate.name)].register_forward_hook(decide)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def transplant(model: nn.Module, source: PathSet | Tensor, *, sites: Sequence[str] | None = None) -> Iterator[None]:
    """While the context lasts, images take the gates that other images have.

    Args:
        model: A wrapped model.
        source: Whose gates: a path set of one image, or of as many as the model will be given, with the layers of this
            model; or such images.
        sites: Gated convolutions at which to take them; all if not given.

    Raises:
        ValueError: If the model is not wrapped, there is no such site, or the paths lack a layer.
    """
    decoupling = decoupling_of(model, "transplant")
    gates = decoupling.plan.gates if sites is None else tuple(_gate_of(decoupling, site) for site in sites)
    if isinstance(source, Tensor):
        values = {name: gate.clone() for name, gate in _answer(model, source)[1].items()}
    else:
        values = {gate.name: torch.from_numpy(source.unpack(gate.name)).float() for gate in gates if len(source)}
    if not values:
        raise ValueError("transplant: source has no image, wanted one, or as many as the model will be given")
    with decoupling.forced({gate.name: values[gate.name] for gate in gates}):
        yield


@dataclass(frozen=True, eq=False, repr=False)
class GateEffect(Result):
    """What switching filters does to the logits of N images.

    Attributes:
        switched: By site, the filters that were opened and those that were closed.
        before: Logits without intervention, shape (N, C).
        total: Logits with it, shape (N, C): later gates decide on what they then see.
        direct: Logits with it while all other gates stay as they were, shape (N, C): total minus direct is what later
            decisions add.
        n_changed: Gates of the named filters that the intervention changed, per image, shape (N,); opening an open
            filter changes nothing.
        class_names: Names for printing, by index of the logit.
    """

    switched: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    before: NDArray[np.float32]
    total: NDArray[np.float32]
    direct: NDArray[np.float32]
    n_changed: NDArray[np.int64]
    class_names: Sequence[str] | None = None

    @property
    def flipped(self) -> NDArray[np.bool_]:
        """Images whose predicted class changes, shape (N,)."""
        return self.before.argmax(1) != self.total.argmax(1)

    def headline(self) -> str:
        """One line: what was switched, how many predictions change."""
        n = len(self.before)
        words = ", ".join(
            f"{site} ({len(opened)} on, {len(closed)} off)" for site, (opened, closed) in self.switched.items()
        )
        return (
            f"{words}: {self.n_changed.mean():.1f} gates change per image, "
            f"{percent(self.flipped.sum(), n)} of {n} predictions"
        )

    def summary(self) -> str:
        """The headline, and a table of the classes whose logits move most."""
        rows = [
            [self._name(c), *(f"{change:+.3f}" for change in (self._mean(self.total)[c], self._mean(self.direct)[c]))]
            for c in self._most_moved()
        ]
        return f"{self.headline()}\n{text_table(['class', 'logit, total', 'direct'], rows)}"

    def __repr__(self) -> str:
        return f"GateEffect({self.headline()})"

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain lists and numbers."""
        return {name: plain(value) for name, value in vars(self).items()} | {"flipped": plain(self.flipped)}

    def plot(self, ax: Axes | None = None) -> Axes:
        """Mean change of the logits that move most, total and direct.

        Args:
            ax: Where to draw; a new figure, unknown to pyplot, if not given.
        """
        shown = self._most_moved()
        ax = new_axes(6.5, 1.4 + 0.4 * len(shown)) if ax is None else ax
        y = np.arange(len(shown))
        ax.barh(y - 0.2, self._mean(self.total)[shown], 0.4, color="#35587f", label="total")
        ax.barh(y + 0.2, self._mean(self.direct)[shown], 0.4, color="#e08214", label="direct")
        ax.set_yticks(y, [self._name(c) for c in shown])
        ax.invert_yaxis()
        ax.axvline(0, color="0.4", linewidth=0.8)
        ax.set_xlabel("change of the logit, mean over images")
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
        write_title(ax, "Effect of switching filters", self.headline())
        return ax

    def _mean(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        return (logits - self.before).mean(axis=0)

    def _most_moved(self) -> NDArray[np.intp]:
        return np.argsort(-np.abs(self._mean(self.total)), kind="stable")[:_N_SHOWN]

    def _name(self, c: int) -> str:
        return str(c) if self.class_names is None else self.class_names[c]


def gate_effect(
    model: nn.Module,
    images: Tensor,
    site: str | Mapping[str, tuple[Filters, Filters]],
    *,
    on: Filters = (),
    off: Filters = (),
    class_names: Sequence[str] | None = None,
) -> GateEffect:
    """What opening or closing filters does to the logits.

    Args:
        model: A wrapped model whose output is (N, C) logits; its modes are kept, it runs in eval mode.
        images: Shape (N, C, H, W), on the model's device.
        site: Name of a gated convolution, or several with their filters: name to (on, off).
        on: Filters to open, for a single site; see ``force``.
        off: Filters to close.
        class_names: Names for printing.

    Raises:
        ValueError: If the model is not wrapped or has another output, or there is no such site or filter.
    """
    decoupling = decoupling_of(model, "gate_effect")
    wanted = {site: (on, off)} if isinstance(site, str) else site
    before, gates = _answer(model, images)
    with force_all(model, wanted):
        total, _ = _answer(model, images)
    switched = {name: _gate_of(decoupling, name) for name in wanted}
    others = {name: gate for name, gate in gates.items() if name not in {g.name for g in switched.values()}}
    with force_all(model, wanted), decoupling.forced(others):
        direct, after = _answer(model, images)
    changed = torch.stack([(gates[g.name] != after[g.name]).sum(1) for g in set(switched.values())]).sum(0)
    lists = {
        name: (_listed(_mask(on, gate, "on")), _listed(_mask(off, gate, "off")))
        for (name, gate), (on, off) in zip(switched.items(), wanted.values(), strict=True)
    }
    before, total, direct, changed = (part.cpu() for part in (before.float(), total.float(), direct.float(), changed))
    return GateEffect(lists, before.numpy(), total.numpy(), direct.numpy(), changed.numpy(), class_names)


@contextmanager
def force_all(model: nn.Module, filters: Mapping[str, tuple[Filters, Filters]]) -> Iterator[None]:
    """``force`` at several sites: name to (on, off)."""
    with ExitStack() as stack:
        for site, (on, off) in filters.items():
            stack.enter_context(force(model, site, on=on, off=off))
        yield


@torch.no_grad()
def _answer(model: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits (N, C) and gates in eval mode."""
    with eval_mode(model):
        logits = model(images)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise ValueError(f"{type(model).__name__} does not return (N, classes) logits, so there is no effect on them")
    return logits, decoupling_of(model).gates()


def _gate_of(decoupling: Decoupling, site: str) -> Gate:
    gate_names = {s.name: s.gate for s in decoupling.plan.sites}
    if site not in gate_names:
        raise ValueError(
            f"{decoupling.plan.model} has no gated convolution {site!r}; the {len(gate_names)} sites are: "
            f"{', '.join(gate_names)}"
        )
    return next(gate for gate in decoupling.plan.gates if gate.name == gate_names[site])


def _mask(filters: Filters, gate: Gate, name: str) -> Tensor:
    """Boolean mask (K,) of the filters."""
    mask = torch.zeros(gate.n_filters, dtype=torch.bool)
    if isinstance(filters, str):
        if filters != "all":
            raise ValueError(f'force: {name} is {filters!r}, wanted indices, a mask or "all"')
        return ~mask
    index = torch.as_tensor(np.asarray(filters))
    if index.dtype == torch.bool and index.shape == mask.shape:
        return index
    if index.numel() == 0:
        return mask
    if index.ndim != 1 or index.is_floating_point() or index.dtype == torch.bool:
        raise ValueError(
            f"force: {name} has shape {tuple(index.shape)} and type {index.dtype}, wanted indices or a mask"
        )
    if index.min() < 0 or index.max() >= gate.n_filters:
        raise ValueError(
            f"force: {name} has filters up to {int(index.max())}, {gate.name!r} has 0 to {gate.n_filters - 1}"
        )
    mask[index.long()] = True
    return mask


def _listed(mask: Tensor) -> tuple[int, ...]:
    return tuple(mask.nonzero().flatten().tolist())
