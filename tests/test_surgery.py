"""Wrapping and unwrapping: the model stays the user's model."""

from __future__ import annotations

import copy
import pickle
import threading
from contextlib import suppress
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import decouplify
from decouplify import selfcheck
from decouplify.decoupling import Decoupling, decoupling_of
from decouplify.errors import PlanError
from decouplify.losses import DecouplingLoss
from toynets import (
    N_CLASSES,
    SIZE,
    TOYS,
    leaves,
    random_gates,
    random_images,
    randomise_gates,
    randomise_statistics,
    run,
)

LABELS = torch.arange(4) % N_CLASSES


def open_gates(model: nn.Module) -> dict[str, Tensor]:
    return {gate.name: torch.ones(gate.n_filters) for gate in model.decoupling.plan.gates}


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that must not change, by name."""
    found: dict[str, Any] = {"keys": list(model.state_dict())}
    for name, module in model.named_modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        attributes = sorted(key for key in vars(module) if not key.startswith("__"))
        found[name] = (type(module), module.training, hooks, attributes, list(module._modules))
    found |= {f"value of {key}": tensor.tolist() for key, tensor in model.state_dict().items()}
    return found


def fresh(name: str) -> nn.Module:
    """A network in a mixture of modes and with a hook of the user's own."""
    model = randomise_statistics(TOYS[name].build()).train()
    list(model.modules())[-1].eval()
    list(model.modules())[1].register_forward_hook(print_nothing)
    return model


def print_nothing(module: nn.Module, args: Any, output: Any) -> None:
    """A hook of the user's own."""


# Before == during == after --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOYS)
def test_wrapping_is_in_place_and_adds_only_keys_under_decoupling(name: str) -> None:
    model = fresh(name)
    kind, keys = type(model), list(model.state_dict())
    assert decouplify.wrap(model, SIZE, **TOYS[name].options) is model
    assert type(model) is kind
    found = list(model.state_dict())
    assert found[: len(keys)] == keys
    assert all(key.startswith("decoupling.") for key in found[len(keys) :])
    assert len(found) >= len(keys) + 4 * len(TOYS[name].gates)


@pytest.mark.parametrize("name", TOYS)
def test_in_eval_mode_the_output_is_the_same_bits(name: str) -> None:
    model, images = fresh(name).eval(), random_images(3)
    before = run(model, images)
    decouplify.wrap(model, SIZE, **TOYS[name].options)
    assert all(torch.equal(a, b) for a, b in zip(before, run(model, images), strict=True))


@pytest.mark.parametrize("name", TOYS)
def test_unwrapping_gives_back_the_identical_module(name: str) -> None:
    model = fresh(name)
    before = snapshot(model)
    decouplify.wrap(model, SIZE, **TOYS[name].options)
    assert snapshot(model) != before
    assert decouplify.unwrap(model) is model
    assert snapshot(model) == before


@pytest.mark.parametrize("name", TOYS)
def test_in_training_with_open_gates_outputs_statistics_and_gradients_are_the_same(name: str) -> None:
    original, wrapped = fresh(name).train(), None
    wrapped = decouplify.wrap(copy.deepcopy(original), SIZE, **TOYS[name].options)
    images = random_images(4)
    torch.manual_seed(1)  # the same dropout for both
    before = leaves(original(images.clone()))
    with wrapped.decoupling.forced(open_gates(wrapped)):
        torch.manual_seed(1)
        after = leaves(wrapped(images.clone()))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    before[0].square().sum().backward()
    after[0].square().sum().backward()
    ours, theirs = dict(wrapped.named_parameters()), dict(original.named_parameters())
    for key, parameter in theirs.items():
        assert (ours[key].grad is None) == (parameter.grad is None), key
        assert parameter.grad is None or torch.allclose(ours[key].grad, parameter.grad, rtol=1e-5, atol=1e-7), key
    for key, buffer in original.named_buffers():
        assert torch.equal(wrapped.get_buffer(key), buffer), key


@pytest.mark.parametrize("name", TOYS)
def test_closed_gates_leave_zeros_where_they_sit(name: str) -> None:
    model = TOYS[name].wrapped().eval()
    seen: dict[Any, Tensor] = {}
    gates = random_gates(model, 2)

    def observer(gate: str, end: Any, y: Tensor) -> None:
        seen[gate, end] = y.movedim(end.axis, 1).clone()

    with model.decoupling.forced(gates), model.decoupling.observed(observer):
        run(model, random_images(2))
    assert {(gate.name, end) for gate in model.decoupling.plan.gates for end in gate.ends} == seen.keys()
    for (gate, _), y in seen.items():
        assert not y.flatten(2).any(2)[gates[gate] == 0].any()


@pytest.mark.parametrize("training", [True, False])
def test_new_modules_take_over_mode_and_precision_of_parameters_stays_float32(training: bool) -> None:
    model = decouplify.wrap(TOYS["Plain"].build().train(training).bfloat16(), SIZE)
    assert model.decoupling.training is training
    assert {p.dtype for p in model.decoupling.parameters()} == {torch.float32}
    assert model(random_images().bfloat16()).dtype == torch.bfloat16


def test_wrapping_on_the_meta_device_stays_there() -> None:
    with torch.device("meta"):
        model = TOYS["Plain"].build()
    decouplify.wrap(model, SIZE)
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_a_failing_wrap_leaves_the_model_untouched() -> None:
    class Noisy(TOYS["Plain"].build):
        def body(self, x: Tensor) -> Tensor:
            return super().body(F.dropout(x, 0.5, training=True))

    model = Noisy().train()
    before = snapshot(model)
    with pytest.raises(
        PlanError, match="with all gates open the wrapped model does not give the output it gave before"
    ):
        decouplify.wrap(model, SIZE)
    assert snapshot(model) == before
    assert not hasattr(model, "decoupling")


def test_a_value_that_bypasses_its_module_is_found_and_the_model_left_untouched() -> None:
    class Bypass(TOYS["NoNorm"].build):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU(inplace=True)

        def body(self, x: Tensor) -> Tensor:
            y = self.conv1(x)
            self.act(y)  # the result is used under the old name, where no hook sees it
            return self.conv2(y)

    model = Bypass()
    before = snapshot(model)
    with pytest.raises(PlanError, match="closed gates leave features where none were expected, at the input of conv2"):
        decouplify.wrap(model, SIZE)
    assert snapshot(model) == before
    decouplify.wrap(model, SIZE, exclude="conv1")


def test_verification_can_be_switched_off() -> None:
    class Random(TOYS["Plain"].build):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * torch.rand(())

    assert isinstance(decouplify.wrap(Random(), SIZE, verify=False).decoupling, Decoupling)


def test_wrapping_an_unwrapped_model_again_works() -> None:
    model = decouplify.unwrap(TOYS["Plain"].wrapped())
    decouplify.wrap(model, SIZE, only="a.0")
    assert [gate.name for gate in model.decoupling.plan.gates] == ["a.0"]


# Copies and pickles ---------------------------------------------------------------------------------------------------


def through_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("clone", [copy.deepcopy, through_pickle])
@pytest.mark.parametrize("name", ["SharedRelu", "ParallelBranches", "BareSequential"])
def test_a_copy_is_an_independent_wrapped_model_also_after_a_training_forward(clone: Any, name: str) -> None:
    model = randomise_gates(TOYS[name].wrapped()).train()
    model(random_images(4))
    other = clone(model)
    images = random_images(3, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(run(model.eval(), images), run(other.eval(), images), strict=True))
    assert torch.equal(model.decoupling.path(), other.decoupling.path())
    for controller in other.decoupling.controllers.values():
        nn.init.zeros_(controller.fc2.weight)
        nn.init.constant_(controller.fc2.bias, -1.0)
    before = model.decoupling.path()
    run(other, images)
    assert not other.decoupling.path().any(), "the copy's gates are decided by the original"
    run(model, images)
    assert torch.equal(model.decoupling.path(), before)
    assert not hasattr(decouplify.unwrap(other), "decoupling")
    assert isinstance(model.decoupling, Decoupling)


def test_a_copy_has_no_forward_to_judge() -> None:
    model = TOYS["Plain"].wrapped().train()
    model(random_images(4))
    assert copy.deepcopy(model).decoupling.gates() == {}
    assert model.decoupling.gates().keys() == {"a.0", "b.0"}


# Forwards -------------------------------------------------------------------------------------------------------------


def test_gates_margins_and_path_are_those_of_the_last_forward_in_execution_order() -> None:
    model = randomise_gates(TOYS["DepthwiseChain"].wrapped()).eval()
    assert model.decoupling.gates() == {}
    run(model, random_images(3))
    gates, margins = model.decoupling.gates(), model.decoupling.margins()
    assert list(gates) == list(margins) == ["expand.0", "project.0", "last"]
    assert all(torch.equal(gates[name], (margins[name] > 0).float()) for name in gates)
    assert torch.equal(model.decoupling.path(), torch.cat(list(gates.values()), 1))
    assert model.decoupling.path().shape == (3, model.decoupling.plan.n_filters)


def test_there_is_no_path_before_a_forward_or_after_half_of_one() -> None:
    model = TOYS["Plain"].wrapped()
    with pytest.raises(RuntimeError, match=r"no path: 2 of 2 gates have no value \(first: a.0\)"):
        model.decoupling.path()
    model.a(model.stem(random_images()))
    with pytest.raises(RuntimeError, match=r"no path: 1 of 2 gates have no value \(first: b.0\)"):
        model.decoupling.path()


def test_a_site_reached_without_its_controller_says_what_to_do() -> None:
    model = TOYS["DepthwiseChain"].wrapped()
    with pytest.raises(RuntimeError, match=r"gate 'expand.0' has no value where 'act' needs it.*exclude"):
        model.act(torch.zeros(1, 16, 4, 4))


def test_parts_of_a_model_called_by_themselves_are_gated_too() -> None:
    model = TOYS["Plain"].wrapped().eval()
    with model.decoupling.forced({"a.0": torch.zeros(8)}):
        assert not run(model.a, torch.randn(2, 8, 4, 4))[0].any()


def test_each_image_of_a_batch_has_its_own_gates() -> None:
    torch.manual_seed(1)
    model, images = randomise_gates(TOYS["NormBeforeAdd"].wrapped()).eval(), random_images(3)
    (together,) = run(model, images)
    paths = model.decoupling.path()
    assert len(paths.unique(dim=0)) == 3
    for image, path, logits in zip(images, paths, together, strict=True):
        (alone,) = run(model, image[None])
        assert torch.equal(model.decoupling.path()[0], path)
        assert torch.allclose(alone[0], logits, atol=1e-5)


def test_two_threads_on_one_model_do_not_mix_their_gates() -> None:
    model = randomise_gates(TOYS["NormBeforeAdd"].wrapped()).eval()
    meeting = threading.Barrier(2, timeout=30)
    batches = [random_images(2, seed=seed) for seed in range(2)]
    expected = []
    for images in batches:
        expected.append((run(model, images)[0], model.decoupling.path()))
    found: dict[int, tuple[Tensor, Tensor]] = {}

    def wait(module: nn.Module, args: Any) -> None:
        meeting.wait()  # both threads have decided the gates so far, and neither goes on before

    handles = [m.register_forward_pre_hook(wait) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.ReLU))]

    def work(i: int) -> None:
        found[i] = (run(model, batches[i])[0], model.decoupling.path())

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for handle in handles:
        handle.remove()
    for i in range(2):
        assert all(torch.equal(a, b) for a, b in zip(found[i], expected[i], strict=True))


@pytest.mark.parametrize(("same_sites", "side"), [(True, 64), (False, 128)])
def test_expensive_networks_are_verified_on_small_images(
    monkeypatch: pytest.MonkeyPatch, same_sites: bool, side: int
) -> None:
    class OneMoreWhenLarge(TOYS["Plain"].build):
        def body(self, x: Tensor) -> Tensor:
            return self.b(self.a(x) if same_sites or x.shape[-1] > 32 else x)

    monkeypatch.setattr(selfcheck, "AFFORDABLE_MACS", 1.0)
    model, shapes = OneMoreWhenLarge(), set()
    handle = model.register_forward_pre_hook(lambda module, args: shapes.add(tuple(args[0].shape)))
    decouplify.wrap(model, (3, 128, 96))
    handle.remove()
    assert {shape for shape in shapes if shape[0] == 2} == {(2, 3, side, min(side, 96))}
    assert model.decoupling.plan.input_size == (3, 128, 96)


# Contexts -------------------------------------------------------------------------------------------------------------


class Leave(Exception):  # noqa: N818  # it tells of no error
    """What the tests raise to leave a context early."""


def test_forced_gates_replace_the_controllers_and_nest() -> None:
    model = TOYS["Plain"].wrapped()
    per_image = torch.tensor([[1.0] * 8, [0.0] * 8])
    with suppress(Leave), model.decoupling.forced({"a.0": torch.zeros(8)}):
        run(model, random_images(2))
        assert not model.decoupling.gates()["a.0"].any()
        with suppress(Leave), model.decoupling.forced({"a.0": per_image, "b.0": torch.zeros(8)}):
            run(model, random_images(2))
            assert torch.equal(model.decoupling.gates()["a.0"], per_image)
            assert not model.decoupling.gates()["b.0"].any()
            raise Leave
        run(model, random_images(2))
        assert not model.decoupling.gates()["a.0"].any()
        assert model.decoupling.gates()["b.0"].any()
        raise Leave
    run(model.eval(), random_images(2))
    assert model.decoupling.path().all()


@pytest.mark.parametrize(
    ("gates", "error", "match"),
    [
        ({"stem.0": torch.ones(8)}, KeyError, "no gate is called 'stem.0'; the gates are a.0, b.0"),
        ({"a.0": torch.ones(7)}, ValueError, r"gate 'a.0': \(7,\) values given, \(8,\) or \(N, 8\) wanted"),
        ({"a.0": torch.ones(1, 1, 8)}, ValueError, r"gate 'a.0': \(1, 1, 8\) values given"),
    ],
)
def test_forced_gates_must_fit(gates: dict[str, Tensor], error: type[Exception], match: str) -> None:
    decoupling = TOYS["Plain"].wrapped().decoupling
    with pytest.raises(error, match=match), decoupling.forced(gates):
        pass


def test_a_bypassed_model_computes_as_if_never_wrapped() -> None:
    model, images = TOYS["SharedRelu"].wrapped().eval(), random_images()
    (before,) = run(model, images)
    randomise_gates(model)
    with suppress(Leave), model.decoupling.bypassed():
        assert torch.equal(run(model, images)[0], before)
        raise Leave
    assert not torch.equal(run(model, images)[0], before)


def test_an_observer_sees_every_gated_value_until_its_context_ends() -> None:
    model = randomise_gates(TOYS["DepthwiseChain"].wrapped()).eval()
    seen: list[tuple[str, str]] = []
    with suppress(Leave), model.decoupling.observed(lambda gate, end, y: seen.append((gate, end.module))):
        run(model, random_images())
        raise Leave
    run(model, random_images())
    assert seen == [("expand.0", "expand.2"), ("expand.0", "act"), ("project.0", "project.1"), ("last", "last")]


# Access ---------------------------------------------------------------------------------------------------------------


def test_the_decoupling_is_found_through_wrappers_that_hold_the_model() -> None:
    class Parallel(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    model = TOYS["Plain"].wrapped()
    compiled = torch.compile(model, backend="eager")
    for outer in (
        model,
        Parallel(model),
        compiled,
        Parallel(compiled),
        torch.compile(Parallel(model), backend="eager"),
    ):
        assert decoupling_of(outer) is model.decoupling


def test_heads_follow_the_models_classes_or_the_request() -> None:
    sizes = [h.out_features for h in TOYS["Plain"].wrapped().decoupling.heads.values()]
    assert sizes == [N_CLASSES, N_CLASSES]
    assert [h.out_features for h in TOYS["Plain"].wrapped(n_classes=2).decoupling.heads.values()] == [2, 2]
    assert list(TOYS["TwoOutputs"].wrapped().decoupling.heads) == []
    assert [h.out_features for h in TOYS["TwoOutputs"].wrapped(n_classes=3).decoupling.heads.values()] == [3, 3]


def test_printing_a_wrapped_model_counts_gates_and_filters() -> None:
    assert "(decoupling): Decoupling(\n    gates=2, filters=16, noise=1.0, hard=False" in str(TOYS["Plain"].wrapped())


def test_a_frozen_model_may_train_its_gates_alone() -> None:
    model = decouplify.wrap(TOYS["Plain"].build().requires_grad_(False), SIZE, frozen_ok=True).train()
    loss = F.cross_entropy(model(random_images(4)), LABELS) + DecouplingLoss(model)(LABELS)
    loss.backward()
    assert model.a[0].weight.grad is None
    assert model.decoupling.controllers["a__0"].fc2.bias.grad.any()
