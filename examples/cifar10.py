"""Decouple a CIFAR-10 ResNet: train or load a dense network, train its gates, look at its paths, run its sparse form.

$ python examples/cifar10.py --data DIRECTORY_OR_FILE [--weights resnet20.safetensors] [--model resnet20] [...]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader, TensorDataset

import decouplify
from decouplify.cifar import crop_and_flip, load_cifar10, resnet20, resnet56
from decouplify.train import DecouplingRecipe, Recipe, decouple, evaluate, train_dense


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = load_cifar10(args.data)
    n_train, n_test = args.n_train or len(data.train_labels), args.n_test or len(data.test_labels)
    train_x, train_y = data.train_images[:n_train].to(device), data.train_labels[:n_train].to(device)
    test_x, test_y = data.test_images[:n_test].to(device), data.test_labels[:n_test].to(device)

    model = {"resnet20": resnet20, "resnet56": resnet56}[args.model]()
    if args.weights:
        model.load_state_dict(load_file(args.weights))
    model.to(device)
    if args.dense_epochs:
        recipe = Recipe(args.dense_epochs, lr=0.1, batch_size=args.batch_size, weight_decay=1e-4, seed=args.seed)
        train_dense(model, train_x, train_y, recipe, augment=crop_and_flip, progress=show)
    dense_accuracy = evaluate(model, test_x, test_y)
    print(f"dense top-1 {100 * dense_accuracy:.2f} % on {n_test} test images")

    decouplify.wrap(model, (3, 32, 32), input_norm=args.input_norm)
    recipe = DecouplingRecipe(
        args.epochs,
        lr=args.lr,
        batch_size=args.batch_size,
        weight_decay=1e-4,
        seed=args.seed,
        mutual_information=args.mutual_information,
        kl=args.kl,
        sparsity=args.sparsity,
        target=args.target,
        warmup_epochs=0.5,
    )
    start = time.perf_counter()
    decouple(model, train_x, train_y, recipe, augment=crop_and_flip, progress=show)
    seconds = time.perf_counter() - start

    paths = decouplify.record(model, DataLoader(TensorDataset(test_x, test_y), 250))
    macs = decouplify.count_macs(model, test_x)
    states = paths.filter_states()
    print(states.summary())
    print(macs)
    fast = decouplify.sparsify(model)
    print(decouplify.verify(model.cpu(), fast, test_x[: args.n_verify].cpu()))
    result = {
        "model": args.model,
        "n_train": n_train,
        "n_test": n_test,
        "dense_top1": round(100 * dense_accuracy, 2),
        "decoupled_top1": round(100 * evaluate(model, test_x.cpu(), test_y.cpu()), 2),
        "mac_reduction": round(macs.reduction, 3),
        "distinct_paths": paths.distinct(),
        "knn_accuracy": round(paths.knn_accuracy(), 4),
        "silent_dynamic_energetic": states.totals,
        "decoupling_seconds": round(seconds),
        "recipe": recipe.__dict__,
    }
    print(json.dumps(result))
    if args.out:
        decouplify.save(model, Path(args.out), extra=result)


def show(epoch: dict[str, float]) -> None:
    print("  ".join(f"{name} {value:.4g}" for name, value in epoch.items()), flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="directory for torchvision's CIFAR-10, or a C10J1 .bin file")
    parser.add_argument("--model", choices=["resnet20", "resnet56"], default="resnet20")
    parser.add_argument("--weights", help="safetensors file of a dense network to start from")
    parser.add_argument("--dense-epochs", type=int, default=0, help="epochs of dense training before decoupling")
    parser.add_argument("--epochs", type=int, default=30, help="epochs of decoupling")
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--target", default="2.0x", help='MAC reduction to aim at, such as "2.0x"')
    parser.add_argument("--mutual-information", type=float, default=0.03)
    parser.add_argument("--kl", type=float, default=0.01)
    parser.add_argument("--sparsity", type=float, default=1e-3)
    parser.add_argument("--input-norm", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--n-train", type=int, help="use only so many training images")
    parser.add_argument("--n-test", type=int, help="use only so many test images")
    parser.add_argument("--n-verify", type=int, default=20, help="images on which both forms are compared")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="where to save the decoupled network")
    return parser.parse_args()


if __name__ == "__main__":
    main()
