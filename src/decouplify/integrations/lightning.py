"""A Lightning callback that moves the schedule of gates and prepares the model for evaluation at the end."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

from torch import Tensor, nn

from decouplify._optional import import_optional
from decouplify.losses import DecouplingLoss
from decouplify.train import DecouplingRecipe, GateSchedule, calibrate, reestimate_norms

__all__ = ["decoupling_callback"]


def decoupling_callback(model: nn.Module, criterion: DecouplingLoss, recipe: DecouplingRecipe) -> Any:
    """A ``lightning.Callback`` for modules whose ``training_step`` adds ``criterion(labels)`` to its loss.

    Before each batch it sets noise, hard gates and ramps for the share of the run that is over; after each batch it
    logs keep_ratio and macs; at the end it estimates the norms' statistics again and calibrates the thresholds, on
    batches of the training loader. The learning rates are the module's affair (see ``parameter_groups``).

    Args:
        model: The wrapped model inside of the Lightning module.
        criterion: Its loss.
        recipe: Of its fields those about gates: anneal, hard_share, ramp_share, information_ramp_share, norm_batches,
            frozen_norms (at the end only: the module decides which norms train) and calibrate.

    Raises:
        ImportError: If lightning is not installed.
        ValueError: If the model is not wrapped.
    """
    lightning = import_optional("lightning.pytorch", "the Lightning callback", extra="train")
    schedule = GateSchedule(model, criterion, recipe)

    class DecouplingCallback(lightning.Callback):  # type: ignore[name-defined,misc]  # exists once lightning is there
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            schedule.set(min(1.0, trainer.global_step / trainer.estimated_stepping_batches))

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if criterion.terms is not None:
                module.log_dict({"keep_ratio": criterion.terms.keep_ratio, "macs": criterion.terms.macs})

        def on_train_end(self, trainer: Any, module: Any) -> None:
            batches = [_to(batch, module.device) for batch in islice(trainer.train_dataloader, recipe.norm_batches)]
            schedule.end()
            reestimate_norms(model, batches, controllers_only=recipe.frozen_norms)
            if recipe.calibrate and criterion.target_macs is not None and batches:
                calibrate(model, [x for x, _ in batches], criterion.target_macs)

        def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
            schedule.end()

    return DecouplingCallback()


def _to(batch: Iterable[Tensor], device: Any) -> tuple[Tensor, None]:
    images = batch if isinstance(batch, Tensor) else next(iter(batch))
    return images.to(device), None
