"""The main job on real photographs: a public CIFAR-10 network, a few epochs on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader, TensorDataset

import decouplify
from decouplify.cifar import crop_and_flip, load_cifar10, resnet20
from decouplify.train import DecouplingRecipe, decouple, evaluate


@pytest.mark.slow
@pytest.mark.data
def test_resnet20_learns_a_path_for_almost_every_image(shared_data: Path) -> None:
    data = load_cifar10(str(shared_data / "data" / "cifar10-jpeg.bin"))
    model = resnet20()
    model.load_state_dict(load_file(shared_data / "models" / "cifar10-resnet20.safetensors"))
    test_x, test_y = data.test_images[:1000], data.test_labels[:1000]
    dense = evaluate(model.eval(), test_x, test_y)

    decouplify.wrap(model, (3, 32, 32), input_norm=True)
    recipe = DecouplingRecipe(4, lr=0.05, weight_decay=1e-4, warmup_epochs=0.5, sparsity=3e-3)
    decouple(model, data.train_images[:5000], data.train_labels[:5000], recipe, augment=crop_and_flip)

    paths = decouplify.record(model, DataLoader(TensorDataset(test_x, test_y), 250), progress=False)
    macs = decouplify.count_macs(model, test_x)
    decoupled = evaluate(model, test_x, test_y)
    print(f"top-1 {dense:.3f} -> {decoupled:.3f}; {macs}; {paths.distinct()} distinct paths of {len(paths)}")
    assert macs.reduction > 1.3
    assert paths.distinct() > len(paths) / 2
    assert decoupled > 0.3  # chance is 0.1; three epochs on a tenth of the data are not a result
    decouplify.verify(model, decouplify.sparsify(model), test_x[:5])
    assert torch.equal(torch.from_numpy(paths.labels), test_y)
