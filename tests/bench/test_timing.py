"""The loop that times, and what is made of its samples."""

from __future__ import annotations

import gc
import os
import time

import pytest
import torch

from decouplify.bench.timing import Samples, Spread, interleave, pinned, ratios


def test_a_spread_is_median_and_percentiles() -> None:
    spread = Spread.of([float(i) for i in range(101)])
    assert spread == Spread(50.0, 20.0, 80.0, 99.0)
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0, 3.0)


def test_ratios_are_taken_round_by_round() -> None:
    slow, fast = Samples([2.0, 30.0, 2.0], []), Samples([1.0, 10.0, 1.0], [])
    assert ratios(slow, fast).median == 2.0
    assert ratios(slow, fast).p99 == pytest.approx(3.0, rel=0.02)


def test_all_contenders_take_their_turns_on_the_same_inputs() -> None:
    calls: list[tuple[str, int]] = []
    contenders = {name: lambda i, name=name: calls.append((name, i)) for name in "abc"}
    samples = interleave(contenders, 2, rounds=4, warm_up=2)
    assert {name: len(s.wall_ms) for name, s in samples.items()} == {"a": 4, "b": 4, "c": 4}
    rounds = [calls[k : k + 3] for k in range(0, len(calls), 3)]
    assert len(rounds) == 6
    assert all(sorted(name for name, _ in turn) == ["a", "b", "c"] for turn in rounds)
    assert [{i for _, i in turn} for turn in rounds] == [{0}, {1}] * 3
    assert len({turn[0][0] for turn in rounds}) == 3, "the same contender is always first"


def test_wall_time_counts_waiting_and_processor_time_does_not() -> None:
    samples = interleave({"sleep": lambda i: time.sleep(0.02)}, 1, rounds=3, warm_up=0)["sleep"]
    assert min(samples.wall_ms) >= 20.0
    assert max(samples.cpu_ms) < 10.0


def test_no_round_starts_after_the_time_but_three_are_measured() -> None:
    assert len(interleave({"a": lambda i: None}, 1, rounds=1000, seconds=0.0)["a"].wall_ms) == 3


def test_garbage_is_not_collected_between_measurements_and_is_afterwards() -> None:
    seen: list[bool] = []
    interleave({"a": lambda i: seen.append(gc.isenabled())}, 1, rounds=3)
    assert not any(seen)
    assert gc.isenabled()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot pin")
def test_threads_and_cores_are_given_back() -> None:
    threads, cores = torch.get_num_threads(), os.sched_getaffinity(0)
    with pinned(1, [min(cores)]):
        assert torch.get_num_threads() == 1
        assert os.sched_getaffinity(0) == {min(cores)}
    assert (torch.get_num_threads(), os.sched_getaffinity(0)) == (threads, cores)
    with pytest.raises(KeyError), pinned(1, [min(cores)]):
        raise KeyError
    assert (torch.get_num_threads(), os.sched_getaffinity(0)) == (threads, cores)


@pytest.mark.parametrize(("threads", "cores", "message"), [(2, [0], "one core per thread"), (1, [4096], "may run on")])
def test_cores_that_do_not_fit_are_refused(threads: int, cores: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message), pinned(threads, cores):
        pass
