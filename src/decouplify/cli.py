"""The entry point of the command line: ``decouplify inspect | train | record | report | detect``."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line on ``sys.argv``; exit status 2 after an error.

    Raises:
        SystemExit: Always; that is how a command line ends.
    """
    try:
        import rich  # noqa: F401  # typer works without, our tables do not
        import typer  # noqa: F401
    except ImportError as error:
        print(f'error: the command line needs {error.name}; pip install "decouplify[cli]"', file=sys.stderr)
        raise SystemExit(2) from None
    from decouplify._commands import app

    app()
