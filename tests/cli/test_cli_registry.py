from __future__ import annotations

import sys

import pytest
import torch

from decouplify.errors import CheckpointError
from decouplify.registry import build_model, model_kwargs, model_names, rebuild_model

pytest.importorskip("timm")
pytest.importorskip("torchvision")


@pytest.mark.parametrize(
    ("spec", "kwargs", "channels"),
    [
        ("timm:test_resnet", {"num_classes": 5, "in_chans": 1}, 1),
        ("timm:test_resnet.r160_in1k", {"num_classes": 5}, 3),
        ("torchvision:squeezenet1_1", {"num_classes": 5}, 3),
    ],
)
def test_a_name_becomes_a_network_with_the_classes_and_channels_asked_for(spec, kwargs, channels):
    model = build_model(spec, **kwargs).eval()
    assert model(torch.zeros(1, channels, 64, 64)).shape == (1, 5)


def test_a_network_with_auxiliary_heads_is_built_without_them_and_without_a_warning():
    model = build_model("torchvision:googlenet", num_classes=5)
    assert model.training
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 5)


def test_no_weights_are_downloaded(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a download was tried")

    for name in ("download_url_to_file", "load_state_dict_from_url"):
        monkeypatch.setattr(torch.hub, name, refuse)
    build_model("timm:test_resnet.r160_in1k")
    build_model("torchvision:squeezenet1_1")
    with pytest.raises(ValueError, match="does not take pretrained"):
        build_model("timm:test_resnet", pretrained=True)
    with pytest.raises(ValueError, match="does not take weights"):
        build_model("torchvision:resnet18", weights="DEFAULT")
    with pytest.raises(ValueError, match="timm has no model 'hf-hub:somebody/something'"):
        build_model("timm:hf-hub:somebody/something")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("timm:resnet81", r"timm has no model 'resnet81'; did you mean timm:resnet18 or"),
        ("torchvision:vgg16bn", r"torchvision has no model 'vgg16bn'; did you mean torchvision:vgg16_bn"),
        ("resnet18", r"'resnet18' names no registry: .* for instance timm:resnet18 or torchvision:resnet18"),
        ("zoo:resnet18", r"'zoo:resnet18' names no registry"),
        ("timm:?", r"timm has no model '\?'; it lists \d+ others"),
        ("torchvision:fasterrcnn_resnet50_fpn", "torchvision has no model"),
    ],
)
def test_an_unknown_name_is_answered_with_close_ones(spec, message):
    with pytest.raises(ValueError, match=message):
        build_model(spec)


def test_arguments_the_network_does_not_take_are_named():
    with pytest.raises(ValueError, match=r"torchvision:resnet18 cannot be built with in_chans=1: .*in_chans"):
        build_model("torchvision:resnet18", in_chans=1)
    with pytest.raises(ValueError, match="no registry 'zoo'"):
        model_names("zoo")


def test_a_missing_package_is_answered_with_the_extra_that_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r'needs timm; install it with: pip install "decouplify\[zoo\]"'):
        build_model("timm:resnet18")
    # Suggestions come from what is there.
    with pytest.raises(ValueError, match=r"for instance torchvision:resnet18 or cifar:resnet56$"):
        build_model("resnet18")


def test_arguments_that_fit_a_data_set():
    assert model_kwargs("timm:resnet18", 10, 1) == {"num_classes": 10, "in_chans": 1}
    assert model_kwargs("torchvision:resnet18", 10, 3) == {"num_classes": 10}
    with pytest.raises(ValueError, match="torchvision:resnet18 reads images of 3 channels, these have 1"):
        model_kwargs("torchvision:resnet18", 10, 1)


def test_a_checkpoint_can_only_name_a_network_and_give_numbers():
    model = rebuild_model({"model": "timm:test_resnet", "model_kwargs": {"num_classes": 4, "in_chans": 1}})
    assert model.num_classes == 4
    with pytest.raises(CheckpointError, match="does not say how to build its network"):
        rebuild_model({})
    for kwargs in ({"checkpoint_path": "evil.pth"}, {"num_classes": "4"}, {"pretrained": True}):
        with pytest.raises(CheckpointError, match="only numbers for num_classes, n_classes, inner, width, in_chans"):
            rebuild_model({"model": "timm:test_resnet", "model_kwargs": kwargs})
