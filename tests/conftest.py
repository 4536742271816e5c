"""What every test shares: seeds, threads, Hypothesis profiles and the data directory."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


class _TorchRandom:
    """Torch's generator in the shape that `hypothesis.register_random` asks for."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


# Kept in a name because Hypothesis holds only a weak reference to it.
_torch_random = _TorchRandom()


def pytest_configure(config: pytest.Config) -> None:
    """Choose the Hypothesis profile and keep parallel workers off each other's cores."""
    # Without this only the first example of a property sees the seed below, and a failure cannot be replayed.
    hypothesis.register_random(_torch_random)
    # No deadline: the first example of a test often pays for tracing a network.
    hypothesis.settings.register_profile("ci", max_examples=50, deadline=None)
    hypothesis.settings.register_profile("nightly", max_examples=500, deadline=None)
    hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
    # What the engine measures while tests run side by side must not decide about the user's networks later.
    cache = os.environ["DECOUPLIFY_CACHE"] = tempfile.mkdtemp(prefix="decouplify-cache-")
    config.add_cleanup(lambda: shutil.rmtree(cache, ignore_errors=True))
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Start every test from the same random state, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The data directory: $DECOUPLIFY_DATA, else a data directory beside the checkout; skips without either."""
    given = os.environ.get("DECOUPLIFY_DATA")
    directory = Path(given) if given else ROOT.parent / "shared"
    if directory.is_dir():
        return directory
    if given:
        # Somebody meant to run these tests: skipping would hide the typing error.
        pytest.fail(f"DECOUPLIFY_DATA is {given!r}, which is not a directory")
    pytest.skip("no data directory: set DECOUPLIFY_DATA to one with images and trained weights")


@pytest.fixture(scope="module")
def joins_small_maps() -> Iterator[None]:
    """Tests need not wait for maps of megabytes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("decouplify.sparse.bands.SMALLEST_MAP", 0)
        yield


def resident_bytes() -> int:
    """Memory of this process that is there, not merely promised."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("needs /proc")
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) << 10
