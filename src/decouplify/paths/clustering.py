"""Do these paths form groups? The Hopkins statistic, with a null distribution that fits bits.

The statistic compares how far random points and how far data points are from the nearest datum: 0.5 means no groups,
towards 1 means groups. The customary form draws the random points uniformly from a box. Bits are never uniform in a
box, so that form says "clustered" about independent rare bits and "regular" about independent frequent ones. The
default draws random paths with the open rates of the data and compares with data whose columns were shuffled.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from decouplify.paths._distance import hamming_block

__all__ = ["Hopkins", "hopkins"]

Method: TypeAlias = Literal["permutation", "classic"]

_SHARE, _AT_LEAST = 0.1, 10  # of the data points are sampled, but never fewer than ten
_DRAWS = 5


@dataclass(frozen=True)
class Hopkins:
    """Whether paths form groups.

    Attributes:
        value: The statistic, in [0, 1]; NaN if it is not defined.
        null: Its mean over column-wise shuffled data; 0.5 by definition for the classic form.
        p_value: Probability of a value at least as high for shuffled data, by the normal distribution with the mean and
            spread of the shufflings (counting them could not go below 1 / their number); NaN for the classic form.
        n_images: Number of images.
        n_varying: Filters that differ between them.
        note: Why there is no value, empty if there is one.
    """

    value: float
    null: float
    p_value: float
    n_images: int
    n_varying: int
    note: str = ""

    @property
    def effect(self) -> float:
        """Value above the null."""
        return self.value - self.null


def hopkins(
    gates: NDArray[np.bool_], *, method: Method = "permutation", n_null: int = 100, exponent: float = 1.0, seed: int = 0
) -> Hopkins:
    """The Hopkins statistic H = sum u / (sum u + sum w) of paths in Hamming distance.

    u is the distance of a random point to the nearest datum, w that of a sampled datum to the nearest other; a tenth of
    the data is sampled, and the mean of five draws is returned.

    Args:
        gates: Paths, shape (N, K).
        method: ``"permutation"``: random points have the open rate of each column, and the null shuffles each column.
            ``"classic"``: random points are uniform in [0, 1]^K and distances Euclidean; Hopkins and Skellam 1954.
        n_null: Shufflings, at least 2, ``"permutation"`` only.
        exponent: Power of the distances; the literature uses 1 or the dimension.
        seed: Seed of all draws.

    Raises:
        ValueError: If the method is unknown or ``n_null`` is less than 2.
    """
    if method not in ("permutation", "classic") or n_null < 2:
        raise ValueError(f'hopkins: method={method!r}, n_null={n_null}; wanted "permutation" or "classic", and >= 2')
    varying = gates[:, gates.any(axis=0) & ~gates.all(axis=0)]
    n, n_varying = varying.shape
    if n < 3 or n_varying == 0:
        note = "fewer than 3 images" if n < 3 else "all paths are equal"
        return Hopkins(float("nan"), 0.5, float("nan"), n, n_varying, note)
    rng = np.random.default_rng(seed)
    if method == "classic":
        return Hopkins(_classic(varying, exponent, rng), 0.5, float("nan"), n, n_varying)
    value = _on_bits(varying, exponent, rng, _DRAWS)
    null = np.array([_on_bits(rng.permuted(varying, axis=0), exponent, rng, 1) for _ in range(n_null)])
    return Hopkins(value, float(null.mean()), _upper_tail(value, null), n, n_varying)


def _upper_tail(value: float, null: NDArray[np.float64]) -> float:
    """One-sided p-value. The null holds single draws, which vary more than the mean of five: it errs to "no groups"."""
    spread = float(null.std(ddof=1))
    if spread == 0:
        return 1.0 if value <= null[0] else 1 / (len(null) + 1)
    return 0.5 * math.erfc((value - float(null.mean())) / (spread * math.sqrt(2)))


def _on_bits(x: NDArray[np.bool_], exponent: float, rng: np.random.Generator, n_draws: int) -> float:
    return float(np.nanmean([_one_draw(x, exponent, rng) for _ in range(n_draws)]))


def _one_draw(x: NDArray[np.bool_], exponent: float, rng: np.random.Generator) -> float:
    m = _n_sampled(len(x))
    random_paths = rng.random((m, x.shape[1])) < x.mean(axis=0)
    chosen = rng.choice(len(x), m, replace=False)
    return _ratio(hamming_block(random_paths, x), hamming_block(x[chosen], x), chosen, exponent)


def _classic(x: NDArray[np.bool_], exponent: float, rng: np.random.Generator) -> float:
    data = x.astype(np.float32)
    values = []
    for _ in range(_DRAWS):
        m = _n_sampled(len(x))
        chosen = rng.choice(len(x), m, replace=False)
        uniform = rng.random((m, x.shape[1]), dtype=np.float32)
        squares = (uniform**2).sum(1)[:, None] + data.sum(1) - 2 * uniform @ data.T
        between_data = np.sqrt(hamming_block(x[chosen], x).astype(np.float64))
        values.append(_ratio(np.sqrt(np.maximum(squares, 0)), between_data, chosen, exponent))
    return float(np.nanmean(values))


def _n_sampled(n: int) -> int:
    return min(n - 1, max(_AT_LEAST, round(_SHARE * n)))


def _ratio(u: NDArray[Any], w: NDArray[Any], chosen: NDArray[np.intp], exponent: float) -> float:
    """H from the distances of random points (m, N) and of sampled data (m, N); 0.5 if all of them are zero."""
    w = w.astype(np.float64)
    w[np.arange(len(chosen)), chosen] = np.inf
    nearest_u, nearest_w = u.min(axis=1).astype(np.float64), w.min(axis=1)
    # Scaled first: the dimension as an exponent would overflow.
    scale = max(nearest_u.max(), nearest_w.max())
    if scale == 0:
        return 0.5
    sum_u, sum_w = ((nearest / scale) ** exponent for nearest in (nearest_u, nearest_w))
    return float(sum_u.sum() / (sum_u.sum() + sum_w.sum()))
