"""The plan: which filters get a gate, where the gate sits, and what was left alone and why. Frozen and printable."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["End", "Gate", "Options", "Plan", "Refusal", "Site"]


@dataclass(frozen=True)
class Options:
    """What the caller asked for; stored in checkpoints so that the same surgery can be repeated.

    Attributes:
        skip_first: Leave the convolutions that read the image alone, as the paper does.
        skip_last: Leave the last convolution alone. The paper's text says so, its figures show it gated.
        reduction: Input channels per hidden unit of a controller (4 in the paper).
        bias: Initial bias of a controller's output, in logits; positive values start with all gates open.
        input_norm: Normalise a controller's pooled input over the batch. Not in the paper; makes paths vary more.
        linear_as_conv: Also gate ``nn.Linear`` layers that act on (N, H, W, C) maps, as in ConvNeXt.
        only: Names or globs of the convolutions to gate; empty means all.
        exclude: Names or globs of convolutions to leave alone.
    """

    skip_first: bool = True
    skip_last: bool = False
    reduction: int = 4
    bias: float = 2.0
    input_norm: bool = False
    linear_as_conv: bool = False
    only: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()


@dataclass(frozen=True)
class End:
    """The place where gate values multiply features.

    Attributes:
        module: The module whose output is multiplied.
        after: None, or the module whose output ``module`` must have received: an activation that serves several
            places is only gated where its input is this very tensor.
        axis: Channel axis of the output, 1 or -1.
        non_negative: Whether the features there are known to be >= 0.
        before_relu: Whether a rectifier that no hook reaches follows. It passes no gradient where a closed gate has
            left a zero, so in training closed gates multiply by a tiny number instead.
    """

    module: str
    after: str | None
    axis: int
    non_negative: bool
    before_relu: bool = False


@dataclass(frozen=True)
class Site:
    """One gated convolution (or linear layer on a map).

    Attributes:
        name: Qualified name of the module that convolves.
        gate: Name of the gate that decides its filters; several sites may share one.
        n_macs: Multiply-accumulates for one image with all filters.
        skips: Whether a closed filter needs no computation. False if a norm over channels stands between the
            convolution and its gate, for then every filter takes part in the statistics.
    """

    name: str
    gate: str
    kind: Literal["conv", "linear"]
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    groups: int
    n_macs: int
    end: End
    skips: bool

    @property
    def description(self) -> str:
        """Kernel and channels in a few characters, such as ``3x3 64->128``."""
        kernel = "x".join(map(str, self.kernel_size)) if self.kind == "conv" else "linear"
        depthwise = self.groups > 1 and self.groups == self.in_channels
        groups = " dw" if depthwise else f" g{self.groups}" if self.groups > 1 else ""
        return f"{kernel} {self.in_channels}->{self.out_channels}{groups}"


@dataclass(frozen=True)
class Gate:
    """One controller: the convolution whose input it pools, and the places its gate values multiply.

    Attributes:
        name: Name of the convolution whose input is pooled; the first site of the gate.
        n_inputs: Channels C of the pooled input.
        n_filters: Gates K.
        input_axis: Channel axis of the pooled input, 1 or -1.
        sites: Names of the gated convolutions, in execution order.
        ends: Where the gate values multiply, without repetition, in execution order.
    """

    name: str
    n_inputs: int
    n_filters: int
    input_axis: int
    sites: tuple[str, ...]
    ends: tuple[End, ...]


@dataclass(frozen=True)
class Refusal:
    """A convolution that is left alone, and why."""

    name: str
    reason: str
    n_macs: int


@dataclass(frozen=True)
class Plan:
    """What ``wrap`` would do to a model, or did. Printing it gives a table.

    Attributes:
        model: Class name of the model.
        input_size: Shape (C, H, W) of the image on which the model was run.
        n_macs: Multiply-accumulates of all convolutions and linear layers for one image.
        gates: In execution order; a calculation path lists their values in this order.
        sites: Gated convolutions in execution order.
        refused: All other convolutions.
        n_classes: Number of classes if the model returns one (N, classes) tensor, else None.
        options: What the caller asked for.
    """

    model: str
    input_size: tuple[int, ...]
    n_macs: int
    gates: tuple[Gate, ...]
    sites: tuple[Site, ...]
    refused: tuple[Refusal, ...]
    n_classes: int | None
    options: Options

    def __deepcopy__(self, memo: dict[int, Any]) -> Plan:
        return self  # frozen

    @property
    def n_filters(self) -> int:
        """Gated filters over all gates: the length of a calculation path."""
        return sum(gate.n_filters for gate in self.gates)

    @property
    def gated_share(self) -> float:
        """Share of the model's multiply-accumulates that lie in gated convolutions, in [0, 1]."""
        return sum(site.n_macs for site in self.sites) / max(self.n_macs, 1)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, dicts, numbers and strings; ``from_dict`` is the inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Plan:
        """The plan of a dictionary made by ``to_dict``, also after a journey through JSON."""
        gates = tuple(
            Gate(**{**g, "sites": tuple(g["sites"]), "ends": tuple(End(**e) for e in g["ends"])})
            for g in record["gates"]
        )
        sites = tuple(
            Site(**{**s, "kernel_size": tuple(s["kernel_size"]), "end": End(**s["end"])}) for s in record["sites"]
        )
        options = {**record["options"], "only": tuple(record["options"]["only"])}
        options["exclude"] = tuple(options["exclude"])
        return cls(
            **{
                **record,
                "input_size": tuple(record["input_size"]),
                "gates": gates,
                "sites": sites,
                "refused": tuple(Refusal(**r) for r in record["refused"]),
                "options": Options(**options),
            }
        )

    def digest(self) -> str:
        """Sixteen hexadecimal digits that differ between plans; stored beside recorded paths."""
        text = json.dumps(self.to_dict(), sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def __str__(self) -> str:
        head = (
            f"{self.model} on {self.input_size}: {len(self.sites)} of {len(self.sites) + len(self.refused)} "
            f"convolutions gated by {len(self.gates)} controllers, {self.n_filters} filters, "
            f"{100 * self.gated_share:.1f} % of {_metric(self.n_macs)}MACs"
        )
        rows = [("site", "conv", "MACs %", "gate", "sits at"), *map(self._row, self.sites)]
        text = head + "\n" + _table(rows)
        if self.refused:
            refused = [("left alone", "MACs %", "reason")]
            refused += [(r.name, self._percent(r.n_macs), r.reason) for r in self.refused]
            text += "\n\n" + _table(refused)
        return text

    def _row(self, site: Site) -> tuple[str, str, str, str, str]:
        gate = "own" if site.gate == site.name else f"of {site.gate}"
        if not site.skips:
            gate += " (computed anyway: norm over channels)"
        after = f" (only after {site.end.after})" if site.end.after else ""
        return (site.name, site.description, self._percent(site.n_macs), gate, site.end.module + after)

    def _percent(self, n_macs: int) -> str:
        return f"{100 * n_macs / max(self.n_macs, 1):.2f}"


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _metric(n: int) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= size:
            return f"{n / size:.2f} {unit}"
    return f"{n} "
