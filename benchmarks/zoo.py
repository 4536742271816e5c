"""Wrap every network of torchvision and timm, check that nothing is lost, and write down what is gated.

Each network is built with random weights (no download), with batch-norm statistics and parameters that no channel has
by accident, and looked at twice, each time in a process of its own. First its plan, on the meta device: what is gated,
what not, and why. Then, the smallest networks first, its numbers:

- gates open: eval output bitwise equal to the original's, original state_dict keys in place
- random gates: every input channel predicted to be zero is exactly zero; masked and sparse form agree
- train mode with gates forced open: outputs and parameter gradients equal the original's
- unwrapped: keys, hooks, modes and outputs as before

Networks that are built for one image size are built for a small one, where that has the same sites. Of heavy networks
one image is compared instead of two, and no training step.

$ python benchmarks/zoo.py --results docs/results/zoo.jsonl            # resumes; one line per network
$ python benchmarks/zoo.py --results docs/results/zoo.jsonl --jobs 16 --deadline 420 --timeout 120
$ python benchmarks/zoo.py --results docs/results/zoo.jsonl --report docs/coverage.md
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import selectors
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# One thread each, also in what reads these variables only once.
os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"))

import torch
from zoo_checks import check_numbers, check_plan, check_smaller_build, may_be_built_smaller
from zoo_networks import all_networks, versions
from zoo_page import page, summary

Row = dict[str, Any]
GIB = 2**30


def main() -> None:
    args = parse_arguments()
    rows = read(*args.known, args.results)
    if args.report:
        args.report.write_text(page(list(rows.values()), all_networks()))
        return
    torch.set_num_threads(1)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    names = [name for name in all_networks() if fnmatch.fnmatch(name, args.only)]
    sweep = Sweep(args, rows)
    sweep.run([plan_task(name) for name in names if needs_plan(rows.get(name), args.retry)])
    if not args.plans_only:
        mine = [rows[name] for name in names if name in rows]
        sweep.run([smaller_build_task(row) for row in mine if is_open(row, args.retry) and may_be_built_smaller(row)])
        mine = [rows[name] for name in names if name in rows]
        sweep.run(sorted(numbers_tasks(mine, args), key=lambda task: task.cost))
    write(args.results, rows)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--results", type=Path, required=True, help="JSON lines, one per network; finished ones are skipped")
    add("--known", type=Path, nargs="*", default=[], help="more results to start from; copied into --results")
    add("--only", default="*", help="glob of names, such as 'timm:resnet*'")
    add("--jobs", type=int, default=1, help="networks at a time, one thread each")
    add("--deadline", type=float, default=float("inf"), help="start no network after so many seconds")
    add("--timeout", type=int, default=300, help="seconds for one network")
    add("--memory", type=float, default=0.8 * free_memory(), help="GiB that all networks at a time may need")
    add("--max-gmacs", type=float, default=120.0, help="networks above this, on the smallest image, are planned only")
    add("--light-from", type=float, default=5.0, help="cost (see ``cost_of``) above which no training step is compared")
    add("--plans-only", action="store_true", help="compare no numbers")
    add("--retry", action="store_true", help="run again what failed or was planned only")
    add("--report", type=Path, help="write the page instead of running anything")
    return parser.parse_args()


def free_memory() -> float:
    """GiB of memory that nobody uses."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB


@dataclass(frozen=True)
class Task:
    """Something to find out about one network.

    Attributes:
        name: The network.
        work: Returns what is added to its row.
        memory: GiB it may need.
        cost: The cheapest run first, in a unit of its own.
    """

    name: str
    work: Callable[[], Row]
    memory: float
    cost: float = 0.0


def plan_task(name: str) -> Task:
    return Task(name, lambda: check_plan(name), memory=3.0)  # a few are built in memory, and have 2 GB of weights


def needs_plan(row: Row | None, retry: bool) -> bool:
    return row is None or ("checked" not in row and retry)


def smaller_build_task(row: Row) -> Task:
    return Task(row["name"], lambda: check_smaller_build(row["name"], row), memory=1.0)


def is_open(row: Row, retry: bool) -> bool:
    """Whether the numbers of a network are still to be compared."""
    checked = str(row.get("checked"))
    return (checked == "pending" and (retry or "error" not in row)) or (retry and checked.startswith("plan only"))


def numbers_tasks(rows: Iterable[Row], args: argparse.Namespace) -> Iterable[Task]:
    """Networks of which numbers can be compared; those that are too big are marked as such."""
    for row in rows:
        if not is_open(row, args.retry):
            continue
        cost = cost_of(row)
        light = cost > args.light_from
        # Weights, folded weights, packed weights; else also gradients, controllers, a snapshot.
        memory = 1.5 + (14 if light else 36) * row["n_params"] / GIB
        if row["gmacs_checked"] > args.max_gmacs:
            row["checked"] = f"plan only: {row['gmacs_checked']:.0f} GMACs on {row['size'][-1]} pixels"
        elif memory > args.memory:
            row["checked"] = f"plan only: needs about {memory:.0f} GiB"
        else:
            yield Task(row["name"], lambda row=row, light=light: check_numbers(row["name"], row, light), memory, cost)


def cost_of(row: Row) -> float:
    """What it costs to compare the numbers of a network, in GMACs."""
    return float(row["gmacs_checked"] + row["n_params"] / 5e7 + row["sites"] / 100)


class Sweep:
    """Runs tasks, several at a time, and keeps the results file up to date."""

    def __init__(self, args: argparse.Namespace, rows: dict[str, Row]) -> None:
        self.args, self.rows = args, rows
        self.start = time.monotonic()
        self.running: dict[int, tuple[Task, int]] = {}  # by the pipe that the result comes through
        self.selector = selectors.DefaultSelector()

    def run(self, tasks: list[Task]) -> None:
        waiting, n_finished = list(tasks), 0
        while waiting or self.running:
            if waiting and time.monotonic() - self.start > self.args.deadline:
                print(f"{len(waiting)} networks left; run again to go on", flush=True)
                waiting = []
            while waiting and self._has_room(waiting[0]):
                self._begin(waiting.pop(0))
            for key, _ in self.selector.select(timeout=1.0):
                row = self._end(key.fd)
                n_finished += 1
                seconds = f"{time.monotonic() - self.start:.0f} s"
                print(f"[{n_finished}/{len(tasks)}, {seconds}] {row['name']}: {summary(row)}", flush=True)

    def _has_room(self, task: Task) -> bool:
        used = sum(other.memory for other, _ in self.running.values())
        return not self.running or (len(self.running) < self.args.jobs and used + task.memory <= self.args.memory)

    def _begin(self, task: Task) -> None:
        """Fork: a crash or a leak of one network must not reach the next."""
        read_end, write_end = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(read_end)
            signal.alarm(self.args.timeout)
            with os.fdopen(write_end, "w") as pipe:
                pipe.write(json.dumps(result_of(task.work)))
            os._exit(0)
        os.close(write_end)
        self.running[read_end] = (task, pid)
        self.selector.register(read_end, selectors.EVENT_READ)

    def _end(self, read_end: int) -> Row:
        task, pid = self.running.pop(read_end)
        self.selector.unregister(read_end)
        with os.fdopen(read_end) as pipe:
            text = pipe.read()
        _, status = os.waitpid(pid, 0)
        ended = f"ended by signal {os.WTERMSIG(status)} (timeout {self.args.timeout} s)"
        found = json.loads(text) if text else {"error": ended}
        before = {k: v for k, v in self.rows.get(task.name, {}).items() if k not in ("error", "at")}
        row = {"name": task.name, "versions": versions(), **before, **found}
        self.rows[task.name] = row
        with self.args.results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        return row


def result_of(work: Callable[[], Row]) -> Row:
    try:
        return work()
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(frame.filename).name}:{frame.lineno}"
        return {"error": f"{type(error).__name__}: {str(error)[:400]}", "at": where}


def read(*files: Path) -> dict[str, Row]:
    """Rows by name of network; a later one replaces an earlier one."""
    lines = [line for file in files if file.exists() for line in file.read_text().splitlines()]
    # A run that was killed may have left half a line.
    return {row["name"]: row for line in lines if line.endswith("}") for row in [json.loads(line)]}


def write(file: Path, rows: dict[str, Row]) -> None:
    """All rows, one per network."""
    file.write_text("".join(json.dumps(rows[name]) + "\n" for name in sorted(rows)))


if __name__ == "__main__":
    sys.exit(main())
