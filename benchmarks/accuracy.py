"""What decoupling costs in accuracy on CIFAR-10: each network against its dense twin and its static twin.

Every row of a network starts from the same dense weights (its row "start", or else those of the repository) and trains
for the same number of epochs:

* dense: without gates, from labels alone;
* static: half of the filters between the two convolutions of each block cut for good (smallest scales of their norms),
  which leaves as many MACs as the gates do; with the same teacher as the gates. The other networks are made uniformly
  narrower, start from nothing and train for the epochs of the start as well;
* decoupled: with gates, steered to the target, the start as teacher;
* inner (ResNets): the same with gates on the first convolution of each block alone, where the static twin is narrow,
  and with the network at the learning rate of the twins. In small runs (``recipes.py``) that did best.

Rows run in slices: a row that does not finish within ``--seconds`` goes on from its state file in the next call.
Networks this small leave part of a GPU idle: run several rows side by side, each with its own ``--results``, and let
NVIDIA's MPS overlap their kernels.

$ PYTHONPATH=src python benchmarks/accuracy.py resnet56-start resnet56-dense-0 resnet56-decoupled-0 --data FILE
$ PYTHONPATH=src python benchmarks/accuracy.py --report > docs/results.md
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
from accuracy_page import page
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import decouplify
from decouplify.cifar import (
    CLASSES,
    MEAN,
    STD,
    Cifar10,
    CifarResNet,
    crop_and_flip,
    googlenet,
    load_cifar10,
    resnet20,
    resnet56,
    vgg19,
)
from decouplify.decoupling import decoupling_of
from decouplify.score import score
from decouplify.train import DecouplingRecipe, Recipe, decouple, json_lines, train_dense

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "resnet20": resnet20,
    "resnet56": resnet56,
    "vgg19": vgg19,
    "googlenet": googlenet,
}
RESULTS = Path("docs/results/accuracy.jsonl")
CHECKPOINTS = Path("examples/checkpoints")
# Where small networks run fast on a GPU; the static twin learns from the teacher as the gates do.
FAST = {"batch_size": 512, "precision": "bfloat16", "channels_last": True, "cuda_graphs": True, "weight_decay": 5e-4}
USUAL: dict[str, dict[str, Any]] = {
    "start": {"lr": 0.2},
    "dense": {"lr": 0.2},
    "static": {"lr": 0.2, "distillation": 0.9},
    "decoupled": {
        "lr": 0.1,
        "gate_lr_factor": 5.0,
        "clip_norm": 2.0,
        "warmup_epochs": 2.0,
        "distillation": 0.9,
        "mutual_information": 0.01,
        "information_ramp_share": 0.1,
        "ramp_share": 0.2,
        "hard_share": 0.4,
        "target": "2.02x",
    },
}
AT_TWINS_RATE = {"lr": 0.2, "gate_lr_factor": 2.5}  # the network; controllers learn as otherwise
USUAL["inner"] = {**USUAL["decoupled"], **AT_TWINS_RATE}
INNER = {"only": ["layer*.conv1"]}
# In a fifth of the usual epochs the terms of information show only with larger weights.
INFORMED = {"mutual_information": 0.1, "kl": 1.0}
# What one core trains in five minutes. In so few steps gates move only at a rate four times as far above the others',
# and the terms of information show only with larger weights.
SMALL = {
    "batch_size": 128,
    "precision": "float32",
    "channels_last": False,
    "cuda_graphs": False,
    "lr": 0.05,
    "gate_lr_factor": 20.0,
    "mutual_information": 0.3,
    "kl": 1.0,
}


@dataclass(frozen=True)
class Row:
    """One training run: which network, which form, for how long, and what differs from the usual recipe."""

    network: str
    form: str
    epochs: int
    seed: int = 0
    changes: dict[str, Any] = field(default_factory=dict)
    wrapping: dict[str, Any] = field(default_factory=dict)
    images: int | None = None  # the first so many of the training images, from the published weights; None: all

    @property
    def start(self) -> str:
        return f"{self.network}-start"


def rows() -> dict[str, Row]:
    """Every row by name."""
    table: dict[str, Row] = {}
    for network, start_epochs, epochs in (
        ("resnet56", 30, 100),
        ("resnet20", 15, 30),
        ("vgg19", 30, 40),
        ("googlenet", 15, 20),
    ):
        table[f"{network}-start"] = Row(network, "start", start_epochs)
        narrowed = network.startswith("resnet")  # the other static twins begin with nothing, so they train longer
        for seed in (0, 1):
            table[f"{network}-dense-{seed}"] = Row(network, "dense", epochs, seed)
            table[f"{network}-static-{seed}"] = Row(network, "static", epochs + (0 if narrowed else start_epochs), seed)
            table[f"{network}-decoupled-{seed}"] = Row(network, "decoupled", epochs, seed)
            if narrowed:
                table[f"{network}-inner-{seed}"] = Row(network, "inner", epochs, seed, wrapping=INNER)
    ablation = {
        "controllers": {"mutual_information": 0.0, "kl": 0.0, "target": None, "sparsity": 0.0, "calibrate": False},
        "sparse": {"mutual_information": 0.0, "kl": 0.0},
        "sparse-kl": {"mutual_information": 0.0},
        "sparse-mi": {"kl": 0.0},
    }
    for name, changes in {**ablation, "all": {}}.items():
        table[f"resnet56-{name}"] = Row("resnet56", "decoupled", 20, 0, {**INFORMED, **changes})
    for form, wrapping in (("small", {}), ("small-no-norm", {"input_norm": False})):
        for name, changes in {**ablation, "all": {}}.items():
            for seed in (0, 1):
                table[f"resnet20-{form}-{name}-{seed}"] = Row(
                    "resnet20", "decoupled", 8, seed, {**SMALL, **changes}, wrapping, images=5000
                )
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
        x, y = self.train_x[: row.images], self.train_y[: row.images]
        options = {
            "augment": crop_and_flip,
            "progress": json_lines(self.work / f"{name}.jsonl"),
            "state": str(self.work / f"{name}.state"),
            "stop_after_s": self.ends - begin,
        }
        if row.form in ("decoupled", "inner"):
            decouplify.wrap(model, (3, 32, 32), verify=False, **{"input_norm": True, **row.wrapping})
            recipe: Recipe = DecouplingRecipe(row.epochs, **self._how(row))
            history = decouple(model, x, y, recipe, teacher=teacher, **options)
        else:
            recipe = Recipe(row.epochs, **self._how(row))
            history = train_dense(model, x, y, recipe, teacher=teacher, **options)
        if not history.finished:
            return None
        result = {"row": name, **asdict(row), "recipe": asdict(recipe), **self._measure(model)}
        result["train_seconds"] = round(sum(epoch["seconds"] for epoch in history.epochs), 1)
        result["shift"] = round(history.shift, 4)
        result["device"] = torch.cuda.get_device_name() if self.device.type == "cuda" else "CPU"
        result["torch"] = torch.__version__
        result["command"] = f"PYTHONPATH=src python benchmarks/accuracy.py {name} --data FILE"
        if row.images is not None:
            result["command"] += " --weights FOLDER"
        self._keep(model, name, result)
        return result

    @staticmethod
    def _how(row: Row) -> dict[str, Any]:
        return {**FAST, **USUAL[row.form], "seed": row.seed, **row.changes}

    def _before(self, row: Row) -> tuple[nn.Module, nn.Module | None]:
        """The network as training finds it, and its teacher."""
        network = NETWORKS[row.network]
        if row.form == "start":
            model = network()
            published = self._published(row)
            if published is not None and published.exists():
                model.load_state_dict(load_file(published))
            return model.to(self.device), None
        start = self._start(row)
        model = network()
        model.load_state_dict(load_file(start))
        teacher = None if row.form == "dense" else copy.deepcopy(model).to(self.device).eval()
        if row.form == "static":
            model = slice_blocks(model, network(inner=0.5)) if isinstance(model, CifarResNet) else network(width=0.7)
        return model.to(self.device), teacher

    def _start(self, row: Row) -> Path:
        """The weights that a row starts from: of its start, or else the repository's, or those published."""
        if row.images is None:
            places: list[Path | None] = [folder / f"{row.start}.safetensors" for folder in (self.work, CHECKPOINTS)]
            advice = f"run the row {row.start} first"
        else:
            places, advice = [self._published(row)], "give the folder with --weights"
        for place in places:
            if place is not None and place.exists():
                return place
        raise SystemExit(f"the weights that {row.network} starts from are missing ({places[0]}): {advice}")

    def _published(self, row: Row) -> Path | None:
        return None if self.weights is None else self.weights / f"cifar10-{row.network}.safetensors"

    def _measure(self, model: nn.Module) -> dict[str, Any]:
        model.to(memory_format=torch.contiguous_format)
        measured = score(model, self.test_x, self.test_y).to_dict()
        if getattr(model, "decoupling", None) is None:
            return measured | {"dense_macs": decouplify.inspect(model, (3, 32, 32)).n_macs}
        return measured | {
            "dense_macs": decoupling_of(model).costs.n_dense,
            "top1_on_another_images_path": top1_on_other_paths(model, self.test_x, self.test_y),
        }

    def _keep(self, model: nn.Module, name: str, result: dict[str, Any]) -> None:
        path = self.work / f"{name}.safetensors"
        if getattr(model, "decoupling", None) is not None:
            decouplify.save(model, path, facts(result))
        else:
            save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)


@torch.no_grad()
def top1_on_other_paths(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Accuracy when each image runs on the path of the image before it in the batch."""
    decoupling, n_right = decoupling_of(model), 0
    for x, y in zip(images.split(500), labels.split(500), strict=True):
        model(x)
        others = {name: gate.roll(1, 0) for name, gate in decoupling.gates().items()}
        with decoupling.forced(others):
            n_right += int((model(x).argmax(1) == y).sum())
    return n_right / len(labels)


def facts(result: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint says about its network beside the weights."""
    network = {"model": f"cifar:{result['network']}", "model_kwargs": {}, "input_size": [3, 32, 32]}
    return network | {"classes": list(CLASSES), "mean": list(MEAN), "std": list(STD), "result": result}


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
    if args.report:
        found = [json.loads(line) for line in args.results.read_text(encoding="utf-8").splitlines()]
        done = {result["row"] for result in found}
        print(page(found, [name for name, row in rows().items() if name not in done and row.form != "start"]), end="")
        return
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
    parser.add_argument("--report", action="store_true", help="print the page of results instead")
    parser.add_argument("--work", type=Path, default=Path("accuracy"), help="folder for states and trained networks")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file that finished rows are appended to")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop before an epoch that would end later")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
