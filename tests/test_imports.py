"""What ``import decouplify`` brings, and what it does not."""

from __future__ import annotations

import subprocess
import sys

import pytest

import decouplify

OPTIONAL = ["timm", "torchvision", "sklearn", "matplotlib", "rich", "typer", "lightning", "PIL", "pandas", "plotly"]


def test_the_public_names() -> None:
    assert decouplify.__all__ == [
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
    assert decouplify.__all__ == sorted(decouplify.__all__)
    assert all(hasattr(decouplify, name) for name in decouplify.__all__)


def run_python(code: str) -> str:
    """What a fresh interpreter prints."""
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_importing_needs_no_optional_package() -> None:
    code = f"import decouplify, sys; print([name for name in {OPTIONAL} if name in sys.modules])"
    assert run_python(code) == "[]"


def test_importing_leaves_random_state_threads_and_warnings_alone() -> None:
    look = "(torch.get_rng_state().sum().item(), torch.get_num_threads(), torch.is_grad_enabled(), warnings.filters[:])"
    assert run_python(f"import torch, warnings; before = {look}; import decouplify; print(before == {look})") == "True"


@pytest.mark.parametrize("module", ["adversarial", "concepts", "losses", "paths", "sparse", "errors", "plan"])
def test_public_names_of_submodules_exist(module: str) -> None:
    found = __import__(f"decouplify.{module}", fromlist=["__all__"])
    assert len(set(found.__all__)) == len(found.__all__)
    assert all(hasattr(found, name) for name in found.__all__)
