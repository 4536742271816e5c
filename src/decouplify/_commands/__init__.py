"""The commands of the command line. Each reads its arguments, calls the library and prints what comes back."""

# In the order in which the help lists them; importing one adds it to the app.
# isort: off
from decouplify._commands import inspect, train, evaluate, record, report, concepts, bench, detect  # noqa: F401
from decouplify._commands.app import app

__all__ = ["app"]
