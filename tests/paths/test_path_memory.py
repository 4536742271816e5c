"""Path sets of ImageNet's size stay within a gigabyte of memory."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from decouplify.paths import PathSet
from decouplify.paths._storage import GrowingNpy, staged_directory

N_IMAGES, N_CLASSES, LAYERS = 1_280_000, 1000, {f"conv{i}": 352 for i in range(12)}

READ = """
import resource, sys
from decouplify.paths import PathSet, class_information, path_map
paths = PathSet.load(sys.argv[1])
assert paths.filter_states().n_filters == 4224
assert paths.activation_histogram().n_images == len(paths)
assert paths.activation_histogram(None).n_filters == 4224
assert 0 < class_information(paths).information.max() < 1
assert paths.subset(range(0, len(paths), 1280)).hamming().shape == (1000, 1000)
assert paths.diff(paths).n_changed.max() == 0
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def write_large_set(directory):
    """Random paths in which a filter of every layer is open more often for one half of the classes."""
    rng = np.random.default_rng(0)
    small = PathSet.from_gates({name: np.zeros((1, n), bool) for name, n in LAYERS.items()}, labels=[0])
    n_bytes = small.bits.shape[1]
    labels = np.arange(N_IMAGES) % N_CLASSES
    with staged_directory(directory) as stage:
        with GrowingNpy(stage / "bits.npy", np.uint8, n_bytes) as file:
            for start in range(0, N_IMAGES, 8000):
                rows = rng.integers(0, 256, (8000, n_bytes), np.uint8)
                rows[:, 0] |= (labels[start : start + 8000] < N_CLASSES // 2).astype(np.uint8)
                file.append(rows)
        bits = np.load(stage / "bits.npy", mmap_mode="r")
        ids, conf = np.arange(N_IMAGES), np.full(N_IMAGES, np.nan, np.float32)
        PathSet(bits, small.layers, ids, labels, np.full(N_IMAGES, -1), conf).write_rest(stage)


@pytest.mark.slow
def test_a_million_paths_are_read_in_less_than_a_gigabyte(tmp_path):
    write_large_set(tmp_path / "set")
    done = subprocess.run([sys.executable, "-c", READ, tmp_path / "set"], capture_output=True, text=True, check=True)
    peak = int(done.stdout)
    print(f"{N_IMAGES} x {sum(LAYERS.values())} bits: {peak} MiB at the most")
    assert peak < 1024
