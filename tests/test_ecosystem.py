"""A wrapped model in the company it will keep: averaging, optimisers, copies, precision, compilation, processes."""

from __future__ import annotations

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import timm
import torch
import torch._inductor.config
import torch.distributed as dist
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.func import functional_call

import decouplify
from decouplify.losses import DecouplingLoss


def small_resnet(**options: object) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=4, in_chans=3)
    return decouplify.wrap(model, (3, 32, 32), **options)


def batch(n: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 32, 32, generator=generator), torch.randint(4, (n,), generator=generator)


def step(model: nn.Module, criterion: DecouplingLoss, x: Tensor, y: Tensor) -> Tensor:
    torch.manual_seed(1)
    loss = F.cross_entropy(model(x), y) + criterion(y)
    loss.backward()
    return loss.detach()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_weight_averaging_follows_the_gates() -> None:
    model = small_resnet()
    average = ModelEmaV3(model, decay=0.5)
    step(model.train(), DecouplingLoss(model), *batch())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    average.update(model)
    name = "decoupling.controllers.layer1__0__conv1.fc2.bias"
    assert torch.allclose(
        dict(average.module.named_parameters())[name], torch.full_like(model.get_parameter(name), 2.5)
    )
    assert average.module.decoupling is not model.decoupling
    average.module(batch()[0])
    assert average.module.decoupling.gates()
    assert not model.decoupling.gates()


def test_timm_optimizers_see_every_parameter_once() -> None:
    model = small_resnet()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
    seen = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(seen) == sorted(id(p) for p in model.parameters())
    before = model.decoupling.controllers["layer1__0__conv1"].fc2.bias.clone()
    step(model.train(), DecouplingLoss(model), *batch())
    optimizer.step()
    assert not torch.equal(before, model.decoupling.controllers["layer1__0__conv1"].fc2.bias)


def test_copies_and_pickles_are_independent_wrapped_models() -> None:
    model = small_resnet().train()
    model(batch()[0])  # leaves graph tensors behind, which can be neither copied nor pickled
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(model.eval()(batch()[0]), other.eval()(batch()[0]))
        with torch.no_grad():
            for controller in other.decoupling.controllers.values():
                controller.fc2.bias.fill_(-1.0)
        other(batch()[0])
        assert all(bool((z == 0).all()) for z in other.decoupling.gates().values())
        model(batch()[0])
        assert all(bool((z == 1).all()) for z in model.decoupling.gates().values())
        decouplify.unwrap(other)


def test_state_dicts_pass_through_torch_save() -> None:
    model, other = small_resnet(), small_resnet()
    with torch.no_grad():
        model.decoupling.controllers["layer1__0__conv1"].fc2.bias.fill_(-1.0)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(model.eval()(batch()[0]), other.eval()(batch()[0]))


def test_original_weights_still_load_by_their_own_names() -> None:
    plain = timm.create_model("test_resnet", num_classes=4)
    missing, unexpected = small_resnet().load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert all(key.startswith("decoupling.") for key in missing)


def test_bfloat16_autocast_trains_gates_in_float32() -> None:
    model = small_resnet().train()
    criterion = DecouplingLoss(model, target="1.5x")
    x, y = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(x)
        assert logits.dtype == torch.bfloat16
        assert all(z.dtype == torch.float32 for z in model.decoupling.gates().values())
        loss = F.cross_entropy(logits, y) + criterion(y)
    loss.backward()
    assert all(g.isfinite().all() for g in gradients(model).values())


def test_half_precision_with_a_loss_scale_trains_gates_in_float32() -> None:
    model = small_resnet().train()
    criterion = DecouplingLoss(model, target="1.5x")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    x, y = batch()
    controller = model.decoupling.controllers["layer1__0__conv1"]
    before = controller.fc2.bias.clone()
    with torch.autocast("cpu", dtype=torch.float16):
        logits = model(x)
        assert logits.dtype == torch.float16
        assert all(z.dtype == torch.float32 for z in model.decoupling.gates().values())
        loss = F.cross_entropy(logits, y) + criterion(y)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**10  # no step was skipped
    assert not torch.equal(controller.fc2.bias, before)
    assert all(p.isfinite().all() for p in model.parameters())


def test_gates_that_overflow_half_precision_skip_the_step_not_the_training() -> None:
    model = small_resnet().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    x, y = batch()
    before = copy.deepcopy(model.state_dict())
    with torch.autocast("cpu", dtype=torch.float16):
        loss = F.cross_entropy(model(x), y)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() < 2.0**127
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_two_models_in_two_threads_keep_to_themselves() -> None:
    models = [small_resnet().eval(), small_resnet().eval()]
    generator = torch.Generator().manual_seed(3)
    for model in models:
        for controller in model.decoupling.controllers.values():
            with torch.no_grad():
                controller.fc2.bias.copy_(torch.randn(controller.fc2.bias.shape, generator=generator))
    images = batch(4)[0]

    def paths_of(model: nn.Module) -> Tensor:
        with torch.no_grad():
            model(images)
        return model.decoupling.path()

    expected = [paths_of(model) for model in models]
    # Each thread runs both models in turn, so that each model also runs in both threads at a time.
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(paths_of, models * 20))
    assert not torch.equal(*expected)
    assert all(torch.equal(path, expected[i % 2]) for i, path in enumerate(found))


def test_channels_last_keeps_layout_and_values() -> None:
    model = small_resnet().eval()
    x = batch()[0]
    expected = model(x)
    found = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    assert torch.allclose(found, expected, atol=1e-5)
    shapes: list[bool] = []
    with model.decoupling.observed(
        lambda gate, end, y: shapes.append(y.is_contiguous(memory_format=torch.channels_last))
    ):
        model(x.to(memory_format=torch.channels_last))
    assert all(shapes)


def test_gradient_checkpointing_gives_the_same_step() -> None:
    plain, checkpointed = small_resnet().train(), small_resnet().train()
    checkpointed.set_grad_checkpointing(True)
    losses = [step(model, DecouplingLoss(model), *batch()) for model in (plain, checkpointed)]
    assert torch.equal(*losses)
    expected = gradients(plain)
    for name, gradient in gradients(checkpointed).items():
        assert torch.allclose(gradient, expected[name], rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_training_step_equals_the_eager_one(backend: str) -> None:
    plain, other = small_resnet().train(), small_resnet().train()
    compiled = torch.compile(other, backend=backend, fullgraph=True)
    losses = [step(plain, DecouplingLoss(plain), *batch()), step(compiled, DecouplingLoss(compiled), *batch())]
    assert torch.allclose(*losses)
    expected = gradients(plain)
    for name, gradient in gradients(other).items():
        assert torch.allclose(gradient, expected[name], rtol=1e-4, atol=1e-6), name


def small_convnet() -> nn.Module:
    """Two convolutions: what takes time under inductor is its C++ compiler, once per fused loop."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 4),
    )
    return decouplify.wrap(model, (3, 32, 32))


@pytest.mark.slow
@pytest.mark.ci_sample
def test_a_training_step_in_compiled_loops_equals_the_eager_one() -> None:
    plain, other = small_convnet().train(), small_convnet().train()
    compiled = torch.compile(other, backend="inductor", fullgraph=True)
    # Inductor's own random numbers are others than torch's, so the gates' noise would be as well.
    with torch._inductor.config.patch(fallback_random=True):
        found = step(compiled, DecouplingLoss(compiled), *batch())
    assert torch.allclose(found, step(plain, DecouplingLoss(plain), *batch()))
    expected = gradients(plain)
    assert expected.keys() == gradients(other).keys()
    for name, gradient in gradients(other).items():
        assert torch.allclose(gradient, expected[name], rtol=1e-3, atol=1e-5), name


def test_an_eager_forward_after_a_compiled_one_is_the_last_forward() -> None:
    model = small_resnet().eval()
    compiled = torch.compile(model, backend="eager")
    compiled(batch(8)[0])
    assert len(model.decoupling.path()) == 8
    model(batch(3)[0])
    assert len(model.decoupling.path()) == 3


def test_functional_call_uses_the_given_controllers() -> None:
    model = small_resnet().eval()
    closed = {name: torch.full_like(p, -1.0) for name, p in model.named_parameters() if name.endswith("fc2.bias")}
    functional_call(model, closed, (batch()[0],))
    assert all(bool((z == 0).all()) for z in model.decoupling.gates().values())


def test_the_masked_form_can_be_exported() -> None:
    model = small_resnet().eval()
    with torch.no_grad():
        for controller in model.decoupling.controllers.values():
            nn.init.normal_(controller.fc2.bias)
    x = batch()[0]
    program = torch.export.export(model, (x,))
    model.decoupling.drop_forward()
    assert torch.allclose(program.module()(x), model(x), atol=1e-6)


def test_timm_methods_work_and_are_gated() -> None:
    model = small_resnet().eval()
    x = batch()[0]
    features = model.forward_features(x)
    assert torch.equal(model.forward_head(features), model(x))
    closed = {gate.name: torch.zeros(gate.n_filters) for gate in model.decoupling.plan.gates}
    with model.decoupling.forced(closed):
        assert not torch.equal(model.forward_features(x), features)
    model.reset_classifier(7)
    assert model(x).shape == (8, 7)


def test_a_changed_number_of_classes_is_noticed() -> None:
    model = small_resnet().train()
    model.reset_classifier(7)
    criterion = DecouplingLoss(model)
    model(batch()[0])
    with pytest.raises(ValueError, match="the heads know 0 to 3"):
        criterion(torch.full((8,), 6))


def _train_in_process(rank: int, world_size: int, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=world_size)
    model = small_resnet().train()
    model.decoupling.hard = True  # no noise, so that every process count draws the same gates
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()  # statistics over a process's own images are another network
    parallel = nn.parallel.DistributedDataParallel(model)
    criterion = DecouplingLoss(parallel, mutual_information=0.03, kl=0.01, sparsity=1e-3)
    x, y = (part.chunk(world_size)[rank] for part in batch(8))
    loss = step(parallel, criterion, x, y)
    dist.all_reduce(loss)
    if rank == 0:
        torch.save({"loss": loss / world_size, **gradients(model)}, f"{directory}/{world_size}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.ci_sample
def test_two_processes_compute_what_one_does(tmp_path: Path) -> None:
    for world_size in (1, 2):
        directory = tmp_path / str(world_size)
        directory.mkdir()
        torch.multiprocessing.spawn(_train_in_process, (world_size, str(directory)), nprocs=world_size)
    one = torch.load(tmp_path / "1" / "1.pt", weights_only=True)
    two = torch.load(tmp_path / "2" / "2.pt", weights_only=True)
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.allclose(two[name], value, rtol=1e-4, atol=1e-6), name


def _train_sharded(rank: int, world_size: int, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=world_size)
    plain = small_resnet().train()
    sharded = fully_shard(copy.deepcopy(plain), mesh=init_device_mesh("cpu", (world_size,)))
    x, y = batch(8)  # the same images in every process, so that the mean of their gradients is one process's
    losses = []
    for model in (plain, sharded):
        model.decoupling.hard = True
        losses.append(step(model, DecouplingLoss(model, mutual_information=0.03, kl=0.01, sparsity=1e-3), x, y))
    assert torch.allclose(*losses)
    expected = gradients(plain)
    for name, parameter in sharded.named_parameters():
        if name in expected:
            assert isinstance(parameter.grad, DTensor), name
            assert torch.allclose(parameter.grad.full_tensor(), expected[name], rtol=1e-4, atol=1e-6), name
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("n_processes", [1, 2])
def test_a_fully_sharded_model_takes_the_same_step(tmp_path: Path, n_processes: int) -> None:
    torch.multiprocessing.spawn(_train_sharded, (n_processes, str(tmp_path)), nprocs=n_processes)
