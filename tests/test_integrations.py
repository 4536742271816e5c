"""Gates learn in loops that are not ours, with the real packages."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import decouplify
from decouplify.cifar import CifarResNet
from decouplify.integrations import GatedCriterion, decoupling_callback
from decouplify.losses import DecouplingLoss, parameter_groups
from decouplify.train import DecouplingRecipe


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return decouplify.wrap(CifarResNet(1, n_classes=4, width=2), (3, 8, 8), input_norm=True)


@pytest.fixture
def images() -> tuple[Tensor, Tensor]:
    return torch.randn(48, 3, 8, 8), torch.randint(0, 4, (48,))


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # lightning's own, of torch's tree utilities
def test_a_lightning_module_follows_the_schedule_of_gates(model: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    recipe = DecouplingRecipe(4, target="1.5x", norm_batches=3)
    criterion = DecouplingLoss(model, target=recipe.target)
    noises: list[float] = []

    class Classifier(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            noises.append(model.decoupling.noise)
            return F.cross_entropy(self.model(batch[0]), batch[1]) + criterion(batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(parameter_groups(self.model, 0.02), momentum=0.9)

    trainer = lightning.Trainer(
        max_epochs=4,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[decoupling_callback(model, criterion, recipe)],
    )
    trainer.fit(Classifier(), DataLoader(TensorDataset(*images), 16))
    assert noises[0] == 1.0
    assert noises == sorted(noises, reverse=True)
    assert noises[-1] == 0.0
    assert model.decoupling.noise == 1.0  # as a fresh model has it
    assert {"keep_ratio", "macs"} <= trainer.logged_metrics.keys()
    assert int(model.bn1.num_batches_tracked) == recipe.norm_batches  # estimated again, from so many batches


def test_a_loop_in_timms_style_needs_one_line(model: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    loss_fn = GatedCriterion(SoftTargetCrossEntropy(), DecouplingLoss(model))
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.05, weight_decay=1e-4)
    mixup = Mixup(mixup_alpha=0.2, num_classes=4)
    before = [p.clone() for p in model.decoupling.parameters()]
    model.train()
    for x, y in zip(images[0].split(16), images[1].split(16), strict=True):
        x, y = mixup(x.clone(), y)
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()
    changed = [not torch.equal(a, b) for a, b in zip(before, model.decoupling.parameters(), strict=True)]
    assert sum(changed) > len(changed) / 2
