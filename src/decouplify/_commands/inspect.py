"""``decouplify inspect``: which convolutions would get a gate."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

import decouplify
from decouplify._commands.app import app
from decouplify._commands.options import Exclude, Json, Linear, Model, Only, parse_size
from decouplify._commands.showing import emit, show
from decouplify.plan import Plan
from decouplify.registry import build_model


@app.command()
def inspect(
    model: Model,
    input_size: Annotated[str | None, typer.Option(metavar="C,H,W", help="Size of one image.")] = None,
    num_classes: Annotated[int | None, typer.Option(min=1, help="Classes; by default the model's own.")] = None,
    linear_as_conv: Linear = False,
    only: Only = None,
    exclude: Exclude = None,
    as_json: Json = False,
) -> None:
    """Show which convolutions of a network would get a gate, and why the others not."""
    size = None if input_size is None else parse_size(input_size)
    kwargs: dict[str, int] = {} if num_classes is None else {"num_classes": num_classes}
    if size is not None and size[0] != 3 and model.startswith("timm:"):
        kwargs["in_chans"] = size[0]
    plan = decouplify.inspect(
        build_model(model, **kwargs), size, linear_as_conv=linear_as_conv, only=only or (), exclude=exclude or ()
    )
    if as_json:
        emit(plan.to_dict() | {"spec": model, "n_filters": plan.n_filters, "gated_share": plan.gated_share})
        return
    _show_plan(plan, model)


def _show_plan(plan: Plan, spec: str) -> None:
    sites = Table("site", "convolution", title=f"{spec} on {plan.input_size}", title_justify="left")
    sites.add_column("MACs, %", justify="right")
    sites.add_column("gate")
    sites.add_column("sits at", overflow="fold")
    for site in plan.sites:
        gate = "own" if site.gate == site.name else f"of {site.gate}"
        gate += "" if site.skips else ", computed anyway"
        sites.add_row(site.name, site.description, _share(site.n_macs, plan.n_macs), gate, site.end.module)
    if plan.sites:
        show(sites)
    if plan.refused:
        refused = Table("left alone")
        refused.add_column("MACs, %", justify="right")
        refused.add_column("reason")
        for refusal in plan.refused:
            refused.add_row(refusal.name, _share(refusal.n_macs, plan.n_macs), refusal.reason)
        show(refused)
    n_convs = len(plan.sites) + len(plan.refused)
    show(
        f"{len(plan.sites)} of {n_convs} convolutions gated by {len(plan.gates)} controllers, {plan.n_filters} "
        f"filters, {100 * plan.gated_share:.1f} % of {plan.n_macs / 1e6:.1f} M MACs"
    )


def _share(part: int, whole: int) -> str:
    return f"{100 * part / max(whole, 1):.2f}"
