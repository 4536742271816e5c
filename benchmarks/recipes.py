"""Small runs that compare recipes: ResNet-14 on 16x16 images, in five to ten minutes on one CPU core.

Every row goes on from the same 14 epochs of dense training on 20,000 of the training images of CIFAR-10, made smaller,
and is judged on 20,000 images that no row trains on: 15,000 of the training images and the 5,000 test images. All that
is taught is taught by the start. Differences below half a point say little, and so small a network loses more at half
of its MACs than a large one: what wins here is worth a run of ``accuracy.py``, and no more.

$ python benchmarks/recipes.py --data cifar10.bin                       # all rows; those that are there are left out
$ python benchmarks/recipes.py --data cifar10.bin --only 'inner*'
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accuracy import AT_TWINS_RATE, INNER, USUAL, slice_blocks, top1_on_other_paths
from label_free import BOTH, read
from recipes_page import RESULTS
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import decouplify
from decouplify.cifar import CifarResNet, crop_and_flip, load_cifar10
from decouplify.decoupling import decoupling_of
from decouplify.score import score
from decouplify.train import DecouplingRecipe, Recipe, decouple, evaluate, train_dense

SIZE, N_TRAIN, N_JUDGED, N_TEST = 16, 20_000, 15_000, 5_000
shift_and_flip = partial(crop_and_flip, reach=2)
COMMON: dict[str, Any] = {"batch_size": 128, "weight_decay": 5e-4}
SHORT: dict[str, Any] = {**USUAL["decoupled"], "warmup_epochs": 1.0}
FROM_IMPORTANCE = {"start": "importance", "ramp_share": 0.0, "hard_share": 1.0}
FEATURES = {"features": "layer[123]"}
A_QUARTER = {**AT_TWINS_RATE, "target": "3.87x"}
NO_INFORMATION = {"mutual_information": 0.0, "kl": 0.0}
GATES_ALONE = {
    **FROM_IMPORTANCE,
    **NO_INFORMATION,
    "trained": "gates",
    "frozen_norms": True,
    "distillation": 1.0,
    "temperature": 2.0,
    "optimizer": "adam",
    "lr": 3e-4,
    "gate_lr_factor": 10.0,
    "steering": 20.0,
    "target": "1.5x",
}


@dataclass(frozen=True)
class Row:
    """One run: the form of the network, how long, what differs from the usual recipe, and the static twin's width."""

    form: str  # dense, static or decoupled
    epochs: int = 8
    seed: int = 0
    changes: dict[str, Any] = field(default_factory=dict)
    wrapping: dict[str, Any] = field(default_factory=dict)
    inner: float = 0.5


ROWS = {
    "dense": Row("dense"),
    "static": Row("static"),
    "static, second seed": Row("static", seed=1),
    "usual": Row("decoupled"),
    "usual, network at 0.2": Row("decoupled", changes=AT_TWINS_RATE),
    "usual from importance": Row("decoupled", changes=FROM_IMPORTANCE),
    "inner": Row("decoupled", wrapping=INNER),
    "inner, network at 0.2": Row("decoupled", changes=AT_TWINS_RATE, wrapping=INNER),
    "inner, network at 0.2, second seed": Row("decoupled", seed=1, changes=AT_TWINS_RATE, wrapping=INNER),
    "inner without MI and KL": Row("decoupled", changes=NO_INFORMATION, wrapping=INNER),
    "inner from importance": Row("decoupled", changes=FROM_IMPORTANCE, wrapping=INNER),
    "static, 16 epochs": Row("static", 16),
    "inner, network at 0.2, 16 epochs": Row("decoupled", 16, changes=AT_TWINS_RATE, wrapping=INNER),
    "static, a quarter": Row("static", inner=0.25),
    "inner, network at 0.2, a quarter": Row("decoupled", changes=A_QUARTER, wrapping=INNER),
    "static, features": Row("static", changes=FEATURES),
    "inner, network at 0.2, features": Row("decoupled", changes={**AT_TWINS_RATE, **FEATURES}, wrapping=INNER),
    "gates alone from importance, 1.5x": Row("decoupled", 2, changes=GATES_ALONE),
    "gates alone from prediction, 1.5x": Row("decoupled", 2, changes={**GATES_ALONE, "start": "prediction"}),
    "gates alone from both, 1.5x": Row("decoupled", 2, changes={**GATES_ALONE, **BOTH}),
    "inner from prediction": Row("decoupled", changes={**FROM_IMPORTANCE, "start": "prediction"}, wrapping=INNER),
}


class Bench:
    """The images, and the weights that all rows start from."""

    def __init__(self, data: str, work: Path) -> None:
        images = load_cifar10(data)
        train_x, test_x = _smaller(images.train_images[: N_TRAIN + N_JUDGED]), _smaller(images.test_images[:N_TEST])
        train_y, test_y = images.train_labels[: N_TRAIN + N_JUDGED], images.test_labels[:N_TEST]
        self.train_x, self.train_y = train_x[:N_TRAIN], train_y[:N_TRAIN]
        self.judged_x, self.judged_y = torch.cat([train_x[N_TRAIN:], test_x]), torch.cat([train_y[N_TRAIN:], test_y])
        self.test_x, self.test_y = test_x, test_y
        self.path = work / "resnet14-start.safetensors"

    def start(self) -> CifarResNet:
        """The network after 14 dense epochs, trained where that has not happened yet."""
        torch.manual_seed(0)
        model = CifarResNet(2)
        if self.path.exists():
            model.load_state_dict(load_file(self.path))
        else:
            train_dense(model, self.train_x, self.train_y, Recipe(14, lr=0.1, **COMMON), augment=shift_and_flip)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            save_file(model.state_dict(), self.path)
        return model.eval()

    def run(self, name: str, row: Row) -> dict[str, Any]:
        """Train and judge one row."""
        start, teacher = self.start(), self.start()
        begin = time.perf_counter()
        model, recipe = self._trained(row, start, teacher)
        seconds = round(time.perf_counter() - begin, 1)
        measured = score(model, self.test_x, self.test_y).to_dict()
        measured["top1"] = evaluate(model, self.judged_x, self.judged_y, 500)
        measured["n_images"] = len(self.judged_y)
        if row.form == "decoupled":
            measured["dense_macs"] = decoupling_of(model).costs.n_dense
            measured["top1_on_another_images_path"] = top1_on_other_paths(model, self.test_x, self.test_y)
        else:
            measured["dense_macs"] = decouplify.inspect(model, (3, SIZE, SIZE)).n_macs
        command = f"PYTHONPATH=src python benchmarks/recipes.py --data FILE --only {name!r}"
        return {"row": name, **asdict(row), "recipe": asdict(recipe), **measured, "train_seconds": seconds} | {
            "torch": torch.__version__,
            "command": command,
        }

    def _trained(self, row: Row, model: CifarResNet, teacher: nn.Module) -> tuple[nn.Module, Recipe]:
        torch.manual_seed(row.seed)
        if row.form == "decoupled":
            decouplify.wrap(model, (3, SIZE, SIZE), verify=False, input_norm=True, **row.wrapping)
            how = DecouplingRecipe(row.epochs, **{**COMMON, **SHORT, "seed": row.seed, **row.changes})
            decouple(model, self.train_x, self.train_y, how, teacher=teacher, augment=shift_and_flip)
            return model, how
        is_static = row.form == "static"
        if is_static:
            model = slice_blocks(model, CifarResNet(2, inner=row.inner))
        share = 0.9 if is_static else 0.0
        recipe = Recipe(row.epochs, lr=0.2, distillation=share, seed=row.seed, **{**COMMON, **row.changes})
        train_dense(
            model, self.train_x, self.train_y, recipe, teacher=teacher if is_static else None, augment=shift_and_flip
        )
        return model, recipe


def _smaller(images: Tensor) -> Tensor:
    return F.interpolate(images, size=SIZE, mode="area")


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(1)
    known = {row["row"] for row in read(args.results)}
    wanted = [name for name in ROWS if name not in known and fnmatch.fnmatch(name, args.only)]
    if not wanted:
        raise SystemExit(f"recipes: no row to run matches {args.only!r}; the rows are {', '.join(ROWS)}")
    bench = Bench(args.data, args.work)
    for name in wanted:
        result = bench.run(name, ROWS[name])
        with args.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
        print(json.dumps({k: v for k, v in result.items() if k not in ("recipe", "command")}), flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="directory for torchvision's CIFAR-10, or a C10J1 .bin file")
    parser.add_argument("--only", default="*", help="rows whose name matches (a glob)")
    parser.add_argument(
        "--work", type=Path, default=Path("recipes"), help="folder for the weights that rows start from"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="file that finished rows are appended to")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
