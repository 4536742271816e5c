"""How fast a network with gates is on this CPU, beside the fastest dense runtimes."""

from decouplify.bench.benchmark import Gates, Protocol, benchmark
from decouplify.bench.masks import calibrate_norms, random_images
from decouplify.bench.result import Result
from decouplify.bench.runtimes import RUNTIMES

__all__ = ["RUNTIMES", "Gates", "Protocol", "Result", "benchmark", "calibrate_norms", "random_images"]
