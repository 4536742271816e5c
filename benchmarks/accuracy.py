"""What decoupling costs in accuracy on CIFAR-10: each network against its dense twin and its static twin.

Every row starts from the same dense network ("start") and trains for the same number of epochs:

* dense: without gates;
* static: half of the filters between the two convolutions of each block cut for good (smallest scales of their norms),
  which leaves as many MACs as the gates do; with the same teacher as the gates;
* decoupled: with gates, steered to the target.

Rows run in slices: a row that does not finish within ``--seconds`` goes on from its state file in the next call.

$ PYTHONPATH=src python benchmarks/accuracy.py resnet56-start resnet56-dense-0 resnet56-decoupled-0 --data FILE
$ PYTHONPATH=src python benchmarks/accuracy.py --report
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import decouplify
from decouplify.cifar import Cifar10, CifarResNet, crop_and_flip, googlenet, load_cifar10, resnet20, resnet56, vgg19
from decouplify.decoupling import decoupling_of
from decouplify.train import DecouplingRecipe, Recipe, decouple, evaluate, json_lines, train_dense

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "resnet20": resnet20,
    "resnet56": resnet56,
    "vgg19": vgg19,
    "googlenet": googlenet,
}
RESULTS = Path("docs/results/accuracy.jsonl")
FAST = {"batch_size": 256, "precision": "bfloat16", "channels_last": True, "cuda_graphs": True}


@dataclass(frozen=True)
class Row:
    """One training run: which network, which form, for how long, and what differs from the usual recipe."""

    network: str
    form: str
    epochs: int
    seed: int = 0
    changes: dict[str, Any] = field(default_factory=dict)
    wrapping: dict[str, Any] = field(default_factory=dict)

    @property
    def start(self) -> str:
        return f"{self.network}-start"


def rows() -> dict[str, Row]:
    """Every row by name."""
    table: dict[str, Row] = {}
    for network, start_epochs, epochs in (
        ("resnet56", 30, 120),
        ("resnet20", 30, 120),
        ("vgg19", 60, 80),
        ("googlenet", 30, 40),
    ):
        table[f"{network}-start"] = Row(network, "start", start_epochs)
        for seed in (0, 1):
            for form in ("dense", "static", "decoupled"):
                table[f"{network}-{form}-{seed}"] = Row(network, form, epochs, seed)
    ablation = {
        "controllers": {"mutual_information": 0.0, "kl": 0.0, "target": None, "sparsity": 0.0, "calibrate": False},
        "sparse": {"mutual_information": 0.0, "kl": 0.0},
        "sparse-kl": {"mutual_information": 0.0},
        "sparse-mi": {"kl": 0.0},
    }
    for name, changes in ablation.items():
        table[f"resnet56-{name}"] = Row("resnet56", "decoupled", 40, 0, changes)
    table["resnet56-all"] = Row("resnet56", "decoupled", 40)
    return table


class Bench:
    """The images, and the folder where states and networks of rows lie."""

    def __init__(self, data: Cifar10, weights: Path | None, work: Path, seconds: float) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.train_x, self.train_y = data.train_images.to(self.device), data.train_labels.to(self.device)
        self.test_x, self.test_y = data.test_images.to(self.device), data.test_labels.to(self.device)
        self.weights, self.work = weights, work
        self.ends = time.perf_counter() + seconds

    def run(self, name: str, row: Row) -> dict[str, Any] | None:
        """The result of a row, or None if its time ran out."""
        begin = time.perf_counter()
        torch.manual_seed(row.seed)
        model, teacher = self._before(row)
        options = {
            "augment": crop_and_flip,
            "progress": json_lines(self.work / f"{name}.jsonl"),
            "state": str(self.work / f"{name}.state"),
            "stop_after_s": self.ends - begin,
        }
        if row.form == "decoupled":
            decouplify.wrap(model, (3, 32, 32), verify=False, **{"input_norm": True, **row.wrapping})
            recipe: Recipe = DecouplingRecipe(row.epochs, **{**self._usual(row), **row.changes})
            history = decouple(model, self.train_x, self.train_y, recipe, teacher=teacher, **options)
        else:
            recipe = Recipe(row.epochs, **{**self._usual(row), **row.changes})
            history = train_dense(model, self.train_x, self.train_y, recipe, teacher=teacher, **options)
        if not history.finished:
            return None
        result = {"row": name, **asdict(row), "recipe": asdict(recipe), **self._measure(model)}
        result["train_seconds"] = round(sum(epoch["seconds"] for epoch in history.epochs), 1)
        result["shift"] = round(history.shift, 4)
        result["device"] = torch.cuda.get_device_name() if self.device.type == "cuda" else "CPU"
        result["torch"] = torch.__version__
        result["command"] = f"PYTHONPATH=src python benchmarks/accuracy.py {name} --data FILE"
        self._keep(model, name, result)
        return result

    def _usual(self, row: Row) -> dict[str, Any]:
        usual: dict[str, Any] = {"lr": 0.1, "weight_decay": 5e-4, "seed": row.seed, **FAST}
        if row.form == "static":
            usual["distillation"] = DecouplingRecipe.distillation
        return usual

    def _before(self, row: Row) -> tuple[nn.Module, nn.Module | None]:
        """The network as training finds it, and its teacher."""
        network = NETWORKS[row.network]
        if row.form == "start":
            model = network()
            published = None if self.weights is None else self.weights / f"cifar10-{row.network}.safetensors"
            if published is not None and published.exists():
                model.load_state_dict(load_file(published))
            return model.to(self.device), None
        start = self.work / f"{row.start}.safetensors"
        if not start.exists():
            raise SystemExit(f"{start} is missing: run the row {row.start} first")
        model = network()
        model.load_state_dict(load_file(start))
        teacher = None if row.form == "dense" else copy.deepcopy(model).to(self.device).eval()
        if row.form == "static":
            model = slice_blocks(model, network(inner=0.5)) if isinstance(model, CifarResNet) else network(width=0.7)
        return model.to(self.device), teacher

    def _measure(self, model: nn.Module) -> dict[str, Any]:
        model.to(memory_format=torch.contiguous_format)
        top1 = evaluate(model, self.test_x, self.test_y)
        measured: dict[str, Any] = {"top1": round(100 * top1, 2), "n_test": len(self.test_y)}
        if getattr(model, "decoupling", None) is None:
            return measured | {"macs": decouplify.inspect(model, (3, 32, 32)).n_macs}
        loader = DataLoader(TensorDataset(self.test_x, self.test_y), 500)
        paths = decouplify.record(model, loader, progress=False)
        macs = decouplify.count_macs(model, self.test_x)
        states = paths.filter_states()
        return measured | {
            "macs": round(float(macs.executed.double().mean())),
            "mac_reduction": round(macs.reduction, 4),
            "silent": round(states.totals["silent"] / states.n_filters, 4),
            "dynamic": round(states.totals["dynamic"] / states.n_filters, 4),
            "energetic": round(states.totals["energetic"] / states.n_filters, 4),
            "distinct_paths": paths.distinct(),
            "path_knn": round(paths.knn_accuracy(), 4),
            "top1_on_another_images_path": round(100 * self._on_other_paths(model), 2),
        }

    @torch.no_grad()
    def _on_other_paths(self, model: nn.Module) -> float:
        """Accuracy when each image runs on the path of the image before it in the batch."""
        decoupling, n_right = decoupling_of(model), 0
        for x, y in zip(self.test_x.split(500), self.test_y.split(500), strict=True):
            model(x)
            others = {name: gate.roll(1, 0) for name, gate in decoupling.gates().items()}
            with decoupling.forced(others):
                n_right += int((model(x).argmax(1) == y).sum())
        return n_right / len(self.test_y)

    def _keep(self, model: nn.Module, name: str, result: dict[str, Any]) -> None:
        path = self.work / f"{name}.safetensors"
        if getattr(model, "decoupling", None) is not None:
            decouplify.save(model, path, {"model": f"cifar:{result['network']}", "data": "CIFAR-10", **result})
        else:
            save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)


def slice_blocks(dense: CifarResNet, narrow: CifarResNet) -> CifarResNet:
    """The narrow network with the filters of the dense one whose norms have the largest scales."""
    wide_blocks = [block for stage in (dense.layer1, dense.layer2, dense.layer3) for block in stage]
    blocks = [block for stage in (narrow.layer1, narrow.layer2, narrow.layer3) for block in stage]
    state = {key: value for key, value in dense.state_dict().items() if not key.startswith("layer")}
    narrow.load_state_dict(state, strict=False)
    for wide, block in zip(wide_blocks, blocks, strict=True):
        kept = wide.bn1.weight.abs().topk(len(block.bn1.weight)).indices.sort().values
        block.conv1.weight.data.copy_(wide.conv1.weight.data[kept])
        block.conv2.weight.data.copy_(wide.conv2.weight.data[:, kept])
        for ours, theirs in zip(block.bn1.state_dict().values(), wide.bn1.state_dict().values(), strict=True):
            ours.copy_(theirs if theirs.dim() == 0 else theirs[kept])
        block.bn2.load_state_dict(wide.bn2.state_dict())
    return narrow


def append(result: dict[str, Any], path: Path) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(result) + "\n")


def main() -> None:
    args = parse_arguments()
    table = rows()
    for name in args.rows:
        if name not in table:
            raise SystemExit(f"no row is called {name!r}; the rows are {', '.join(table)}")
    args.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(load_cifar10(args.data), args.weights, args.work, args.seconds)
    for name in args.rows:
        result = bench.run(name, table[name])
        if result is None:
            print(f"{name}: not finished, call again", flush=True)
            continue
        append(result, args.results)
        print(json.dumps({k: v for k, v in result.items() if k not in ("recipe", "command")}), flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help=f"what to run: {', '.join(rows())}")
    parser.add_argument("--data", help="directory for torchvision's CIFAR-10, or a C10J1 .bin file")
    parser.add_argument("--weights", type=Path, help="folder with published dense weights, cifar10-NETWORK.safetensors")
    parser.add_argument("--work", type=Path, default=Path("accuracy"), help="folder for states and trained networks")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file that finished rows are appended to")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop before an epoch that would end later")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
