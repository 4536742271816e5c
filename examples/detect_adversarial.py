"""Attack a decoupled CIFAR-10 network and detect the attacked images by their paths, with controls and baselines.

Reads a checkpoint written by examples/cifar10.py. One table per attack (all numbers go to --out, the tables also into
--page), then a map of paths between two classes, and what the monitor flags. 1,000 images and a ResNet-56 take 13 to 15
minutes of processor time per attack, half of it for gradients; --n-images and --n-critical shorten it.

$ python examples/detect_adversarial.py --data cifar10.bin --checkpoint resnet56.safetensors \
      --original cifar10-resnet56.safetensors --out docs/results/detection.json --page docs/adversarial.md
"""

from __future__ import annotations

import argparse
import json
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import decouplify
from decouplify.adversarial import (
    BASELINES,
    PGD,
    AdaptiveAttack,
    DetectionResult,
    PathMonitor,
    PixelModel,
    adversarial_map,
    craft,
    detect,
)
from decouplify.checkpoint import read_record
from decouplify.cifar import CLASSES, MEAN, STD, load_cifar10, resnet20, resnet56

NETWORKS = {"resnet20": resnet20, "resnet56": resnet56}
SOURCE, TARGET = CLASSES.index("dog"), CLASSES.index("truck")


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(0)
    extra = read_record(args.checkpoint)["extra"]
    name = extra["model"].rpartition(":")[2]  # "resnet56", or "cifar:resnet56"
    model = PixelModel(decouplify.load(NETWORKS[name](), args.checkpoint), MEAN, STD).eval()
    original = None
    if args.original:
        original = NETWORKS[name]().eval()
        original.load_state_dict(load_file(args.original))
    data = load_cifar10(args.data)
    images, labels = pixels(data.test_images), data.test_labels
    found = earlier(args.out, {"network": name, "checkpoint": extra})
    for attack in filter(None, args.attacks.split(",")):
        result = table(model, original, images[: args.n_images], labels[: args.n_images], attack, args)
        print(result.table(), "\n")
        found["tables"] = [known for known in found["tables"] if known["attack"] != attack] + [result.to_dict()]
        keep(found, args)
    found["map"] = between_classes(model, images, labels, args.picture)
    found["monitor"] = monitored(model, images, labels, args.n_images)
    print(json.dumps({key: found[key] for key in ("map", "monitor")}, indent=2))
    keep(found, args)


def table(
    model: PixelModel,
    original: nn.Module | None,
    images: Tensor,
    labels: Tensor,
    attack: str,
    args: argparse.Namespace,
) -> DetectionResult:
    wall, cpu = time.perf_counter(), time.process_time()
    others = [other for other in ("fgsm", "mifgsm", "pgd") if other != attack][:2]
    result = detect(
        model,
        images,
        labels,
        attack,
        unseen=() if args.brief else others,
        adaptive_weight=None if args.brief else AdaptiveAttack.weight,
        baselines=[name for name in BASELINES if not args.brief or name != "critical paths"],
        original=original,
        n_critical=args.n_critical,
        progress=lambda stage: print(f"{time.perf_counter() - wall:5.0f} s  {stage}", flush=True),
    )
    times = {"wall_s": round(time.perf_counter() - wall), "cpu_s": round(time.process_time() - cpu)}
    return replace(result, facts={**result.facts, **times})


def earlier(out: Path | None, about: dict[str, Any]) -> dict[str, Any]:
    """What an earlier run found out about the same checkpoint, so that attacks can be run one by one."""
    if out and out.is_file():
        found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        if {key: found.get(key) for key in about} == about:
            return found
    return {**about, "tables": []}


def keep(found: dict[str, Any], args: argparse.Namespace) -> None:
    """Write what there is so far."""
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if args.page:
        write_page(args.page, found)


def pixels(normalised: Tensor) -> Tensor:
    """Images in [0, 1]."""
    return (normalised * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)).clamp(0, 1)


def record(model: PixelModel, images: Tensor, labels: Tensor) -> decouplify.PathSet:
    batches = zip(images.split(250), labels.split(250), strict=True)
    return decouplify.record(model.module, [(model.normalise(x), y) for x, y in batches], progress=False)


def between_classes(model: PixelModel, images: Tensor, labels: Tensor, picture: Path | None) -> dict[str, Any]:
    """Dogs, trucks, and dogs attacked to be taken for trucks (Figure 10 of the paper)."""
    clean = record(model, images[:2000], labels[:2000])
    dogs = images[:2000][(labels[:2000] == SOURCE) & torch.from_numpy(clean.preds == SOURCE)][:100]
    attacked = PGD(targeted=True)(model, dogs, torch.full((len(dogs),), TARGET))
    found = adversarial_map(clean, record(model, attacked, torch.full((len(dogs),), SOURCE)), SOURCE, TARGET)
    print(found.summary())
    if picture:
        found.plot(class_names=CLASSES).figure.savefig(picture, dpi=120)
    return {
        "n_attacked": len(dogs),
        "n_success": len(found.to_source),
        "shares": found.shares,
        "mean_distance_to_source": float(found.to_source.mean()),
        "mean_distance_to_target": float(found.to_target.mean()),
        "usual_distance_source": found.usual_source,
        "usual_distance_target": found.usual_target,
        "knn_accuracy_of_groups": found.map.knn_accuracy,
    }


def monitored(model: PixelModel, images: Tensor, labels: Tensor, n_images: int) -> dict[str, float]:
    """Shares of images that a monitor of 2,000 other test images flags; 5 % of ordinary ones are meant to be."""
    ordinary = record(model, images[-2000:], labels[-2000:])
    monitor = PathMonitor(ordinary, model)
    rates = torch.from_numpy(ordinary.rates(by="preds").rates).float()
    x, y = images[:200], labels[:200]
    noise = torch.rand(200, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    shares = {"clean": images[:n_images], "uniform noise": noise, "upside down": images[:1000].flip(2)}
    for name, attack in (("pgd", PGD()), ("adaptive", AdaptiveAttack(rates))):
        crafted = craft(attack, model, x, y)
        shares[name] = crafted.images[crafted.success]
    return {name: round(float(monitor.score(part).flagged.mean()), 4) for name, part in shares.items()}


def write_page(page: Path, found: dict[str, Any]) -> None:
    """Replace what stands between the two marks of the page."""
    parts = [in_words(DetectionResult.from_dict(described), found["network"]) for described in found["tables"]]
    if "map" in found:
        shares = ", ".join(f"{name} {100 * share:.0f} %" for name, share in found["map"]["shares"].items())
        flagged = ", ".join(f"{name} {100 * share:.1f} %" for name, share in found["monitor"].items())
        parts.append(
            f"### {found['network']}, map and monitor\n\n{found['map']['n_success']} of {found['map']['n_attacked']} "
            f"dogs are taken for trucks after a targeted PGD attack. Their paths are nearer to: {shares}. The monitor "
            f"flags: {flagged}.\n"
        )
    marks = r"(<!-- detection: begin -->\n).*?(<!-- detection: end -->)"
    text = re.sub(marks, lambda m: m[1] + "\n" + "\n".join(parts) + "\n" + m[2], page.read_text("utf-8"), flags=re.S)
    page.write_text(text, encoding="utf-8")


def in_words(result: DetectionResult, network: str) -> str:
    views = dict.fromkeys(row.features for row in result.rows if result.kind(row) == "attack")
    better = {view: sorted({row.features for row in result.beaten_by("random_forest", 10, view)}) for view in views}
    beaten = "; ".join(f"than {view}: {', '.join(names) or 'none'}" for view, names in better.items())
    return (
        f"### {network}, {result.attack}\n\n{result.n_correct} of {result.n_images} test images are classified "
        f"correctly and attacked, with success on {result.rows[0].n_success}. Baselines with a higher AUC on the same "
        f"images (random forest, 10 per class) {beaten}. {result.facts['cpu_s']} s of processor time.\n\n"
        f"{result.to_markdown()}\n" + "".join(f"\n{remark}\n" for remark in result.remarks())
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="directory for torchvision's CIFAR-10, or a C10J1 .bin file")
    parser.add_argument("--checkpoint", required=True, help="a decoupled network, written by examples/cifar10.py")
    parser.add_argument("--original", help="safetensors file of the network before decoupling")
    parser.add_argument("--attacks", default="pgd,cdrp", help="fgsm, bim, pgd, mifgsm, cdrp; empty: none")
    parser.add_argument("--n-images", type=int, default=1000)
    parser.add_argument("--n-critical", type=int, default=200, help="images for critical data routing paths")
    parser.add_argument("--brief", action="store_true", help="no other attacks, no critical paths")
    parser.add_argument("--out", type=Path, help="JSON file for all numbers")
    parser.add_argument("--page", type=Path, help="Markdown page whose marked part gets the tables")
    parser.add_argument("--picture", type=Path, help="where to draw the map")
    return parser.parse_args()


if __name__ == "__main__":
    main()
