"""The dense runtimes to measure against, all in float32 with the same number of threads."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from decouplify._optional import import_optional

__all__ = ["RUNTIMES", "Contender", "export_onnx", "start"]


@dataclass(frozen=True)
class Contender:
    """Something to time.

    Attributes:
        name: How tables call it.
        version: Version of the runtime and how it was set up.
        run: Runs input number i and returns its outputs, tensors or arrays.
    """

    name: str
    version: str
    run: Callable[[int], Any]

    def outputs(self, i: int) -> list[Tensor]:
        """Outputs for one input as tensors of their own."""
        leaves = pytree.tree_leaves(self.run(i))
        return [torch.as_tensor(np.array(leaf) if not isinstance(leaf, Tensor) else leaf.clone()) for leaf in leaves]


def start(name: str, model: nn.Module, inputs: Sequence[Tensor], threads: int, onnx_file: Path) -> Contender:
    """A dense network made ready in one runtime.

    Args:
        name: One of ``RUNTIMES``.
        model: What ``dense_module`` returns.
        inputs: Batches, all of one shape.
        threads: Threads to compute with.
        onnx_file: Where the network lies for runtimes that read files; written if it is not there.

    Raises:
        ImportError: If a package is missing.
        RuntimeError: If the runtime does not take the network.
    """
    return RUNTIMES[name](model, inputs, threads, onnx_file)


def _eager(model: nn.Module, inputs: Sequence[Tensor], threads: int, onnx_file: Path) -> Contender:
    return Contender("eager", f"torch {torch.__version__}, norms folded", lambda i: model(inputs[i]))


def _compiled(model: nn.Module, inputs: Sequence[Tensor], threads: int, onnx_file: Path) -> Contender:
    compiled = torch.compile(model, backend="inductor", options={"freezing": True})
    with _no_warnings():
        compiled(inputs[0])  # compiles
    return Contender("torch.compile", f"torch {torch.__version__}, inductor, freezing", lambda i: compiled(inputs[i]))


def _onnxruntime(model: nn.Module, inputs: Sequence[Tensor], threads: int, onnx_file: Path) -> Contender:
    ort = import_optional("onnxruntime", "the onnxruntime baseline", extra="bench")
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    export_onnx(model, inputs[0], onnx_file)
    session = ort.InferenceSession(str(onnx_file), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    arrays = [x.numpy() for x in inputs]
    return Contender("onnxruntime", f"onnxruntime {ort.__version__}", lambda i: session.run(None, {name: arrays[i]}))


def _openvino(model: nn.Module, inputs: Sequence[Tensor], threads: int, onnx_file: Path) -> Contender:
    ov = import_optional("openvino", "the openvino baseline", extra="bench")
    export_onnx(model, inputs[0], onnx_file)
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    core = ov.Core()
    request = core.compile_model(core.read_model(onnx_file), "CPU", settings).create_infer_request()
    arrays = [x.numpy() for x in inputs]
    version = ov.__version__.partition("-")[0]
    return Contender("openvino", f"openvino {version}", lambda i: list(request.infer({0: arrays[i]}).values()))


#: Name to the function that makes a network ready.
RUNTIMES: dict[str, Callable[[nn.Module, Sequence[Tensor], int, Path], Contender]] = {
    "eager": _eager,
    "torch.compile": _compiled,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}


def export_onnx(model: nn.Module, example: Tensor, path: Path) -> None:
    """Write a network for the runtimes that read ONNX files, unless the file is there already.

    Raises:
        ImportError: If the packages for exporting are missing.
    """
    if path.exists():
        return
    for package in ("onnx", "onnxscript"):
        import_optional(package, "exporting a network to ONNX", extra="bench")
    # Under another name first: an interrupted export must not pass for a finished one.
    partial = path.with_suffix(".partial")
    with _no_warnings():
        torch.onnx.export(model, (example,), str(partial), dynamo=True, verbose=False, external_data=False)
    partial.rename(path)


@contextmanager
def _no_warnings() -> Iterator[None]:
    """The exporter and the compiler warn about their own insides, which nobody here can change."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
