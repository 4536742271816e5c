"""The pool of threads that all loops of the engine share, in a program that has nothing else in it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT

KERNELS = ROOT / "src/decouplify/sparse/kernels"

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or shutil.which("g++") is None, reason="needs g++ on Linux"
)


def build(directory: Path, *options: str) -> Path:
    program = directory / "run_loops"
    sources = [ROOT / "tests/native/run_loops.cpp", KERNELS / "threads.cpp"]
    command = ["g++", "-std=c++17", "-O1", *options, f"-I{KERNELS}", *map(str, sources), "-o", str(program), "-pthread"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return program


def run(program: Path, *arguments: str) -> None:
    # The sanitizer has something against threads after a fork by itself.
    environment = {**os.environ, "TSAN_OPTIONS": "die_after_fork=0"}
    command = [str(program), *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert ended.returncode == 0, ended.stderr


def test_every_task_is_done_once_and_missing_memory_is_told(tmp_path: Path) -> None:
    run(build(tmp_path), "20000")


def test_where_there_are_no_more_threads_those_there_are_do_everything(tmp_path: Path) -> None:
    run(build(tmp_path), "100", "few-threads")


@pytest.mark.slow
def test_threads_do_not_race(tmp_path: Path) -> None:
    program = build(tmp_path, "-g", "-fsanitize=thread")
    run(program, "2000")
