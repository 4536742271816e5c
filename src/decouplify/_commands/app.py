"""The command line itself: its options, and how errors are shown."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

import decouplify
from decouplify.trace import quiet_fake_tensors

__all__ = ["app"]


class _Group(TyperGroup):
    """Prints errors of the library in red instead of a traceback and exits with status 2."""

    def invoke(self, ctx: Any) -> Any:
        if ctx.params.get("debug"):
            return super().invoke(ctx)
        try:
            with quiet_fake_tensors():
                return super().invoke(ctx)
        except (typer.Exit, typer.Abort, BrokenPipeError):  # the first two are RuntimeErrors
            raise
        except (ValueError, RuntimeError, OSError, ImportError) as error:
            first, _, rest = str(error).partition("\n")
            console = Console(stderr=True)
            console.print(Text(f"error: {first}", style="red"), soft_wrap=True)
            if rest:
                console.print(Text(rest), soft_wrap=True)
            raise typer.Exit(2) from error


app = typer.Typer(
    name="decouplify", cls=_Group, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"decouplify {decouplify.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error comes from.")] = False,
) -> None:
    """Convolutional networks that pick, for each image, the filters they need."""
