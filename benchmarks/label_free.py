"""Gates for a pretrained ImageNet network from a few hundred images without labels, and what they cost in agreement.

EfficientNet-Lite0 learns from its own answers on four of every five images and is judged on the others: how often the
gated network answers as the original does (agreement), and how often rightly (top-1), for several MAC reductions and
for what may be trained; "start" is the network before any training, with the least important filters closed. Images
are a zip or folder of JPEGs with ``labels.json`` (see ``examples/pretrained.py``).

$ python benchmarks/label_free.py --images images.zip                       # resumes; one line per row
$ python benchmarks/label_free.py --images images.zip --only 'all 1.3x'
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import decouplify
from decouplify.decoupling import decoupling_of
from decouplify.train import DecouplingRecipe, decouple, json_lines

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from pretrained import agreement, crop_and_flip, efficientnet_lite0, load_images, logits_of, top1

RESULTS = Path("docs/results/label_free.jsonl")
EVERY = 5  # one of so many images judges
USUAL: dict[str, Any] = {
    "epochs": 3,
    "lr": 5e-5,
    "batch_size": 20,
    "optimizer": "adam",
    "weight_decay": 1e-4,
    "gate_lr_factor": 20.0,
    "warmup_epochs": 0.5,
    "temperature": 2.0,
    "steering": 20.0,
    "start": "importance",
    "frozen_norms": True,
    "channels_last": True,
    "mutual_information": 0.0,
    "kl": 0.0,
    "hard_share": 1.0,
    "ramp_share": 0.0,
}
BOTH = {"start": "prediction", "start_rounds": 4, "reconstruct": True}
FORMS: dict[str, dict[str, Any]] = {
    "start": {"epochs": 0},
    "gates": {"trained": "gates"},
    "gates and norms": {"trained": "gates and norms", "lr": 1e-4},
    "all": {"trained": "all"},
    "start in rounds": {"epochs": 0, "start_rounds": 4},
    "all in rounds": {"start_rounds": 4},
    "all in rounds, features": {"start_rounds": 4, "features": "blocks.?.?"},
    "start, reconstructed": {"epochs": 0, "start_rounds": 4, "reconstruct": True},
    "all, reconstructed": {"start_rounds": 4, "reconstruct": True, "gate_lr_factor": 2.0},
    "start, predicted": {"epochs": 0, "start": "prediction"},
    "gates, predicted": {"trained": "gates", "start": "prediction", "gate_lr_factor": 2.0},
    "all, predicted": {"start": "prediction", "gate_lr_factor": 2.0},
    "start, both": {"epochs": 0, **BOTH},
    "gates, both": {"trained": "gates", "gate_lr_factor": 2.0, **BOTH},
}
ROWS = [
    *((form, "1.3x") for form in FORMS),
    *((form, target) for target in ("1.1x", "1.2x", "1.5x", "2.0x") for form in ("start", "all")),
    *((form, target) for target in ("1.5x", "2.0x") for form in ("start in rounds", "all in rounds")),
    *((f"{form}, reconstructed", target) for target in ("1.1x", "1.2x", "1.5x", "2.0x") for form in ("start", "all")),
    *(("start, predicted", target) for target in ("1.1x", "1.2x", "1.5x", "2.0x")),
    ("gates, predicted", "1.5x"),
    *((form, target) for target in ("1.2x", "1.5x", "2.0x") for form in ("start, both", "gates, both")),
]


def main() -> None:
    args = parse_arguments()
    images, labels = load_images(args.images)
    judged = torch.arange(len(images)) % EVERY == EVERY - 1
    known = {row["row"] for row in read(args.results)}
    for form, target in ROWS:
        name = f"{form} {target}"
        if name in known or not fnmatch.fnmatch(name, args.only):
            continue
        row = run(name, form, target, images[~judged], images[judged], labels[judged], args.work)
        with args.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


def run(name: str, form: str, target: str, train: Tensor, test: Tensor, labels: Tensor, work: Path) -> dict[str, Any]:
    """Train one row and judge it."""
    work.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    torch.manual_seed(0)
    model = efficientnet_lite0().eval()
    original = logits_of(model, test)
    decouplify.wrap(model, verify=False, input_norm=True)
    recipe = DecouplingRecipe(target=target, **(USUAL | FORMS[form]))
    progress = json_lines(work / f"{name}.jsonl")
    decouple(model, train, None, recipe, augment=crop_and_flip, progress=progress, state=str(work / f"{name}.state"))
    return {
        "row": name,
        "n_train": len(train),
        "n_test": len(test),
        **judge(model, original, test, labels),
        "original_top1": top1(original, labels),
        "seconds": round(time.perf_counter() - begin, 1),
        "recipe": asdict(recipe),
        "torch": torch.__version__,
        "command": f"python benchmarks/label_free.py --images FILE --only '{name}'",
    }


@torch.no_grad()
def judge(model: nn.Module, original: Tensor, test: Tensor, labels: Tensor) -> dict[str, Any]:
    """Agreement and top-1 in per cent, divergence in nats, executed MACs, and what gates do over the judged images."""
    decoupling, answers, paths = decoupling_of(model, "judge"), [], []
    for x in test.split(20):
        answers.append(model(x))
        paths.append(decoupling.path())
    after, path = torch.cat(answers), torch.cat(paths)
    opened = path.mean(0)
    divergence = F.kl_div(F.log_softmax(after, 1), F.log_softmax(original, 1), reduction="batchmean", log_target=True)
    return {
        "agreement": round(agreement(original, after), 1),
        "top1": round(top1(after, labels), 1),
        "divergence": round(float(divergence), 4),
        "mac_reduction": round(decoupling.costs.n_dense / float(decoupling.costs.executed(path.double()).mean()), 3),
        "silent": round(float((opened == 0).float().mean()), 3),
        "energetic": round(float((opened == 1).float().mean()), 3),
        "distinct_paths": len(path.unique(dim=0)),
    }


def section(rows: list[dict[str, Any]]) -> list[str]:
    """The part of the page of results that is about training without labels."""
    order = {f"{form} {target}": i for i, (form, target) in enumerate(ROWS)}
    lines = [
        "## Without labels",
        "",
        "<!-- Written by: python benchmarks/accuracy.py --report, from rows of benchmarks/label_free.py -->",
        "",
        "EfficientNet-Lite0 with ImageNet weights, 400 images without labels to learn from and 100 others to judge by,",
        "on two cores. *Agreement*: how often the gated network answers as the original does; *top-1*: how often",
        "rightly. *Divergence*: KL(original || gated) of the answers, in nats. *start*: the filters with the least",
        "Fisher information per multiply-accumulate closed, for every image alike, before any training; *in rounds*: a",
        "quarter of them at a time, what is left being judged anew; *gates*: only gates learn; *gates and norms*: also",
        "the affine parameters of norms; *all*: everything; *features*: what the blocks return is taught as well;",
        "*reconstructed*: closed in rounds, then weights fitted to what is left; *predicted*: the filters that matter",
        "least for each image closed, as far as controllers can tell; *both*: closed in rounds and fitted until a",
        "factor of 1.15 is left, for which each image closes filters of its own (these ran on one core beside other",
        "work). One run each; the standard error of a share of 100 images is 3 to 5 points. Other roundings move a",
        "divergence by 0.08 at 1.3x, other samples of the importance by up to 0.2 at 2.0x: most rows with neither",
        "reconstruction nor prediction cannot be told from their neighbours, nor can the two with reconstruction. The",
        "recipe was chosen among seven at 1.3x, rounds were added, and the first values of the prediction's fit were",
        "chosen among two, with these 100 images in view; reconstruction and prediction were chosen on 100 others,",
        "which are among the 400 here.",
        "",
        "| trained | reduction | agreement | top-1 | divergence | silent / energetic | distinct paths | seconds |",
        "|---|---|---|---|---|---|---|---|",
        *(_line(row) for row in sorted(rows, key=lambda row: (row["recipe"]["target"], order.get(row["row"], 99)))),
        "",
    ]
    original = rows[0]["original_top1"] if rows else float("nan")
    return [
        *lines,
        f"The original has top-1 {original:.1f} on these images. Rows: `docs/results/label_free.jsonl`.",
        "",
    ]


def _line(row: dict[str, Any]) -> str:
    cells = (
        row["row"].rsplit(" ", 1)[0],
        f"{row['mac_reduction']:.2f}x",
        f"{row['agreement']:.0f} %",
        f"{row['top1']:.0f} %",
        f"{row['divergence']:.2f}",
        f"{100 * row['silent']:.0f} % / {100 * row['energetic']:.0f} %",
        f"{row['distinct_paths']} of {row['n_test']}",
        f"{row['seconds']:.0f}",
    )
    return "| " + " | ".join(cells) + " |"


def read(path: Path) -> list[dict[str, Any]]:
    """The finished rows."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="a zip file or a directory of JPEGs")
    parser.add_argument("--only", default="*", help="glob of rows, such as 'all *'")
    parser.add_argument("--work", type=Path, default=Path("label-free"), help="folder for states of unfinished rows")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file that finished rows are appended to")
    return parser.parse_args()


if __name__ == "__main__":
    main()
