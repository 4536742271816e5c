"""Hamming distances between paths, and what can be read off them without keeping them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def hamming_block(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Number of differing bits of every pair, by |a| + |b| - 2 a.b.

    One matrix product is several times faster than counting bits of XORs, and float32 holds these integers exactly up
    to 16 million bits per path.

    Args:
        a: Shape (n, F).
        b: Shape (m, F).

    Returns:
        Shape (n, m), in [0, F].
    """
    x, y = a.astype(np.float32), b.astype(np.float32)
    distances = x @ y.T
    distances *= -2
    distances += x.sum(axis=1)[:, None]
    distances += y.sum(axis=1)
    return distances.astype(np.int32)


def class_members(labels: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.intp], NDArray[np.int64]]:
    """Sorted class values (C,), each row's class index (N,), and images per class (C,)."""
    values, index, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    return values, index.reshape(-1), sizes.astype(np.int64)


def vote_credit(
    distances: NDArray[np.int32], own_class: NDArray[np.intp], one_hot: NDArray[np.float32], k: int
) -> NDArray[np.float64]:
    """How far the k nearest of each row vote for the row's own class.

    Neighbours tied at the k-th distance share the places left in equal parts, and classes tied for most votes share the
    credit: the result depends neither on the order of the images nor on chance.

    Args:
        distances: Shape (n, N); a row's distance to itself must have been made larger than all others.
        own_class: Class index of each row, shape (n,).
        one_hot: Classes of the N images, shape (N, C).
        k: Number of neighbours, at most N - 1.

    Returns:
        Shape (n,), in [0, 1]: 1 if the own class wins alone, 1/m if it is one of m winners, else 0.
    """
    kth = np.partition(distances, k - 1, axis=1)[:, k - 1 : k]
    nearer = (distances < kth).astype(np.float32) @ one_hot  # (n, C)
    tied = (distances == kth).astype(np.float32) @ one_hot
    places_left = k - nearer.sum(axis=1, keepdims=True)
    # Multiplied through by the number of tied neighbours, votes are integers and compare exactly.
    votes = np.rint(nearer.astype(np.float64) * tied.sum(axis=1, keepdims=True) + tied.astype(np.float64) * places_left)
    winners = votes == votes.max(axis=1, keepdims=True)
    return winners[np.arange(len(winners)), own_class] / winners.sum(axis=1)


def class_distance_sums(
    paths: NDArray[np.bool_], own_class: NDArray[np.intp], sizes: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Sum of the Hamming distances from each path to all paths of each class, without visiting pairs.

    The sum of |a| + |b| - 2 a.b over the b of a class needs only the class's size and its sum of rows.

    Args:
        paths: Shape (N, F).
        own_class: Class index of each row, shape (N,).
        sizes: Images per class, shape (C,).

    Returns:
        Shape (N, C).
    """
    one_hot = np.equal.outer(np.arange(len(sizes)), own_class).astype(np.float32)
    row_sums = (one_hot @ paths.astype(np.float32)).astype(np.float64)  # (C, F), counts of images: exact
    sums = np.empty((len(paths), len(sizes)))
    for start in range(0, len(paths), 1024):
        x = paths[start : start + 1024].astype(np.float64)
        sums[start : start + 1024] = np.outer(x.sum(axis=1), sizes) + row_sums.sum(axis=1) - 2 * x @ row_sums.T
    return sums


def silhouette(sums: NDArray[np.float64], own_class: NDArray[np.intp], sizes: NDArray[np.int64]) -> float:
    """Mean silhouette of the classes, in [-1, 1]; NaN with fewer than two classes (Rousseeuw 1987).

    Images alone in their class count 0, as do images at distance 0 from everything.

    Args:
        sums: Distance sums per class, shape (N, C).
        own_class: Class index of each row, shape (N,).
        sizes: Images per class, shape (C,).
    """
    if len(sizes) < 2:
        return float("nan")
    rows = np.arange(len(sums))
    others = sizes[own_class] - 1
    inside = sums[rows, own_class] / np.maximum(others, 1)
    means = sums / sizes
    means[rows, own_class] = np.inf
    outside = means.min(axis=1)
    larger = np.maximum(inside, outside)
    defined = (others > 0) & (larger > 0)
    return float(np.where(defined, (outside - inside) / np.where(defined, larger, 1), 0).mean())


def between_within(sums: NDArray[np.float64], own_class: NDArray[np.intp], sizes: NDArray[np.int64]) -> float:
    """Mean distance of pairs of different classes over mean distance of pairs of the same class.

    1 means that classes do not show in the distances. NaN if there are no such pairs or all distances are 0; infinite
    if only those within classes are.
    """
    n_within, n_all = float((sizes * (sizes - 1)).sum()), len(sums) * (len(sums) - 1)
    within = float(sums[np.arange(len(sums)), own_class].sum())
    between = float(sums.sum()) - within
    if n_within == 0 or n_within == n_all or (within == 0 and between == 0):
        return float("nan")
    return float("inf") if within == 0 else (between / (n_all - n_within)) / (within / n_within)


def stratified_rows(labels: NDArray[Any], n_wanted: int, seed: int) -> NDArray[np.intp]:
    """Sorted rows of a random subset in which every class keeps its share, within one image.

    Args:
        labels: Shape (N,).
        n_wanted: Size of the subset; all rows are returned if there are not more.
        seed: Seed of the draw.
    """
    if len(labels) <= n_wanted:
        return np.arange(len(labels))
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    _, index, sizes = class_members(labels[shuffled])
    by_class = np.argsort(index, kind="stable")
    place = np.empty(len(labels))
    starts = np.cumsum(sizes) - sizes
    place[by_class] = np.arange(len(labels)) - np.repeat(starts, sizes)
    # The i-th image of a class with n images sits at (i + 1/2) / n: cutting this line anywhere keeps the shares.
    position = (place + 0.5) / sizes[index]
    return np.sort(shuffled[np.argsort(position, kind="stable")[:n_wanted]])
