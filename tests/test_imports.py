"""What importing the package costs and offers."""

from __future__ import annotations

import subprocess
import sys

import decouplify

PUBLIC = [
    "PathSet",
    "Plan",
    "__version__",
    "count_macs",
    "inspect",
    "load",
    "losses",
    "record",
    "save",
    "sparsify",
    "unwrap",
    "verify",
    "wrap",
]


def test_the_public_names_are_these() -> None:
    assert decouplify.__all__ == PUBLIC
    assert sorted(PUBLIC) == PUBLIC
    assert all(hasattr(decouplify, name) for name in PUBLIC)


def test_importing_brings_no_optional_package_along() -> None:
    optional = ["timm", "torchvision", "sklearn", "matplotlib", "rich", "typer", "PIL"]
    code = f"import sys, decouplify; print([name for name in {optional} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
