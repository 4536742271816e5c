"""Convolutional networks that pick, for each image, the filters they need."""

from decouplify import losses
from decouplify._version import __version__
from decouplify.checkpoint import load, save
from decouplify.macs import count_macs
from decouplify.paths import PathSet, record
from decouplify.plan import Plan
from decouplify.reporting import report
from decouplify.sparse import sparsify, verify
from decouplify.surgery import inspect, unwrap, wrap

__all__ = [
    "PathSet",
    "Plan",
    "__version__",
    "count_macs",
    "inspect",
    "load",
    "losses",
    "record",
    "report",
    "save",
    "sparsify",
    "unwrap",
    "verify",
    "wrap",
]
