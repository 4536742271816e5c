"""Recording a run: every call is seen, knows its owner, and leaves no trace on the model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Interpreter, Node

from decouplify import aten
from decouplify.errors import TraceError
from decouplify.trace import Trace, copy_sharing_tensors, default_input_size, trace
from toynets import SIZE, TOYS, Classifier, leaves, random_images, run


class Replay(Interpreter):
    """Runs a recorded graph on other images."""

    def __init__(self, recorded: Trace) -> None:
        super().__init__(nn.Module(), graph=recorded.graph)
        self.tensors = recorded.tensors

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Tensor:
        return self.tensors[target]


def calls_named(recorded: Trace, name: str) -> list[Node]:
    return [node for node in recorded.graph.nodes if aten.name_of(node) == name]


@pytest.mark.parametrize("name", TOYS)
def test_replaying_the_recording_on_another_image_gives_the_models_output(name: str) -> None:
    model = TOYS[name].build().eval()
    recorded = trace(model, SIZE)
    images = random_images(1, seed=1)
    with torch.no_grad():
        replayed = leaves(Replay(recorded).run(images.clone()))
    for found, expected in zip(replayed, run(model, images), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", TOYS)
def test_tracing_leaves_modes_values_hooks_and_attributes_alone(name: str) -> None:
    model = TOYS[name].build().train()
    next(iter(model.children())).eval()
    before = copy.deepcopy(model)
    trace(model, SIZE)
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    assert [sorted(vars(m)) for m in model.modules()] == [sorted(vars(m)) for m in before.modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    for key, tensor in before.state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor), key


def test_every_call_knows_the_innermost_module_that_made_it() -> None:
    recorded = trace(TOYS["FunctionalRelu"].build(), SIZE)
    nodes = [n for n in recorded.graph.nodes if n.op == "call_function"]
    assert [(aten.name_of(n), recorded.owner_of(n)) for n in nodes] == [
        ("conv2d", "stem.0"),
        ("batch_norm", "stem.1"),
        ("relu", "stem.2"),
        ("conv2d", "a.conv"),
        ("batch_norm", "a.bn"),
        ("relu", "a"),
        ("conv2d", "b.conv"),
        ("batch_norm", "b.bn"),
        ("relu", "b"),
        ("mean", ""),
        ("linear", "fc"),
    ]


def test_module_calls_are_recorded_with_inputs_and_outputs() -> None:
    recorded = trace(TOYS["SharedRelu"].build(), SIZE)
    relus = [call for call in recorded.calls if call.name == "relu"]
    assert recorded.n_calls["relu"] == 2
    assert recorded.n_calls["conv1"] == 1
    assert [aten.name_of(call.inputs[0]) for call in relus] == ["batch_norm", "add"]
    assert [aten.name_of(call.outputs[0]) for call in relus] == ["relu", "relu"]
    assert all(call.computed(call.outputs[0]) for call in relus)


def test_a_module_that_returns_its_input_has_not_computed_it() -> None:
    for name in ("IdentityOnOneWay", "DropoutOnOneWay"):
        recorded = trace(TOYS[name].build(), SIZE)
        (call,) = (call for call in recorded.calls if call.name == "identity")
        assert call.inputs == call.outputs
        assert not call.computed(call.outputs[0])


def test_dropout_in_eval_mode_is_no_node_of_its_own() -> None:
    recorded = trace(TOYS["DropoutOnOneWay"].build(), SIZE)
    norm = next(n for n in calls_named(recorded, "batch_norm") if recorded.owner_of(n) == "bn")
    assert calls_named(recorded, "dropout") == []
    assert [recorded.owner_of(user) for user in norm.users] == ["left.0", "right.0"]


def test_in_place_calls_are_recorded_in_single_assignment_form() -> None:
    recorded = trace(TOYS["NormBeforeAdd"].build(), SIZE)
    (add,) = calls_named(recorded, "add")  # written as y += shortcut
    assert [recorded.owner_of(n) for n in add.args] == ["expand.1", "shortcut.1"]
    assert [recorded.owner_of(user) for user in add.users] == ["act"]
    assert not recorded.hazards


def test_parameters_and_buffers_keep_their_names() -> None:
    model = TOYS["FixedWeight"].build()
    recorded = trace(model, SIZE)
    norm = "weight", "bias", "running_mean", "running_var"
    convs = {f"{part}.0.weight" for part in ("stem", "a", "b")}
    norms = {f"{part}.1.{tensor}" for part in ("stem", "a", "b") for tensor in norm}
    assert recorded.tensors.keys() == convs | norms | {"blur.kernel", "fc.weight", "fc.bias"}
    assert recorded.parameters == {name for name, _ in model.named_parameters()}
    assert all(recorded.tensors[name] is tensor for name, tensor in model.named_parameters())


def test_a_tensor_in_a_plain_attribute_gets_a_number_and_counts_as_static() -> None:
    class Scaled(Classifier):
        def __init__(self) -> None:
            super().__init__(4)
            self.scale = torch.full((1, 4, 1, 1), 2.0)

        def body(self, x: Tensor) -> Tensor:
            return x * self.scale.sqrt()

    model = Scaled()
    recorded = trace(model, SIZE)
    (constant,) = recorded.tensors.keys() - dict(model.named_parameters()).keys() - dict(model.named_buffers()).keys()
    assert constant.startswith("_constant")
    assert torch.equal(recorded.tensors[constant], model.scale)
    assert all(root in recorded.static for root in calls_named(recorded, "sqrt"))


def test_what_does_not_depend_on_the_image_is_static() -> None:
    recorded = trace(TOYS["SqueezeExcite"].build(), SIZE)
    static = {recorded.owner_of(n) for n in calls_named(recorded, "conv2d") if n in recorded.static}
    assert static == {"embed"}


def test_random_numbers_are_not_static() -> None:
    class Noisy(Classifier):
        def body(self, x: Tensor) -> Tensor:
            return x + torch.rand(1, 4, 1, 1)

    recorded = trace(Noisy(4), SIZE)
    (noise,) = calls_named(recorded, "rand")
    assert noise not in recorded.static


def test_a_write_through_another_name_marks_all_of_its_memory() -> None:
    recorded = trace(TOYS["WriteThroughView"].build(), SIZE)
    (conv,) = (n for n in calls_named(recorded, "conv2d") if recorded.owner_of(n) == "conv")
    assert conv in recorded.hazards
    assert {aten.name_of(n) for n in recorded.hazards} == {"conv2d", "slice", "add"}


def test_a_value_kept_from_before_an_in_place_call_is_marked() -> None:
    class Kept(Classifier):
        def body(self, x: Tensor) -> Tensor:
            view = x.view_as(x)
            return view + x.add_(1)

    recorded = trace(Kept(4), SIZE)
    assert [aten.name_of(n) for n in recorded.graph.nodes if n in recorded.hazards] == ["relu", "view_as", "add"]


# What cannot be recorded ----------------------------------------------------------------------------------------------


def if_positive(x: Tensor) -> Tensor:
    return x * 2 if x.mean() > 0 else x


def scaled_by_item(x: Tensor) -> Tensor:
    return x * x.sum().item()


def scaled_by_count(x: Tensor) -> Tensor:
    return x / (1 + (x > 0).nonzero().shape[0])


def scaled_by_mask(x: Tensor) -> Tensor:
    return x / (1 + x[x > 0].shape[0])


def clipped_unless_equal(x: Tensor) -> Tensor:
    return x if torch.equal(x, x.clamp(0, 6)) else F.relu6(x)


class Reading(Classifier):
    """Does something to the stem's features that depends on their values."""

    def __init__(self, read: Any) -> None:
        super().__init__(4)
        self.read = read
        self.register_buffer("n_calls", torch.zeros(()))

    def body(self, x: Tensor) -> Tensor:
        self.n_calls += 1
        return self.read(x)


@pytest.mark.parametrize("read", [if_positive, scaled_by_item, scaled_by_count, scaled_by_mask, clipped_unless_equal])
def test_control_flow_on_values_of_the_features_is_refused(read: Any) -> None:
    model = Reading(read)
    with pytest.raises(TraceError, match=r"module '' reads values of the features \(\w+\).*Wrap a part of the model"):
        trace(model, SIZE)
    assert model.n_calls == 0, "the recording wrote into a buffer of the model"


def test_control_flow_on_shapes_buffers_and_parameters_is_fine() -> None:
    class Harmless(Classifier):
        def __init__(self) -> None:
            super().__init__(4)
            self.register_buffer("limit", torch.tensor(100.0))

        def body(self, x: Tensor) -> Tensor:
            x = x if x.shape[2] > self.limit else x * 2
            return x if self.fc.bias.sum().item() > 1e6 else x * 3

    model = Harmless()
    recorded = trace(model, SIZE)
    assert [n.args[1] for n in calls_named(recorded, "mul")] == [2, 3]
    assert model.limit == 100


def test_a_failed_run_leaves_the_model_as_it_was() -> None:
    model = TOYS["NoNorm"].build().train()
    before = copy.deepcopy(model)
    with pytest.raises(
        TraceError, match=r"NoNorm does not run on one image of size \(3, 2, 2\): RuntimeError: .*Kernel"
    ):
        trace(model, (3, 2, 2))
    assert [sorted(vars(m)) for m in model.modules()] == [sorted(vars(m)) for m in before.modules()]
    assert all(m.training for m in model.modules())
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.state_dict().values(), strict=True)
    )


def test_a_model_with_several_inputs_is_told_what_to_do() -> None:
    class TwoInputs(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + y

    with pytest.raises(
        TraceError, match=r"TwoInputs does not run.*missing 1 required.*wrap its convolutional backbone"
    ):
        trace(TwoInputs(), SIZE)


def test_values_are_read_from_parts_of_features_too() -> None:
    class CountsAHalf(Classifier):
        def body(self, x: Tensor) -> Tensor:
            first, second = x.chunk(2, 1)
            return x[:, :, : 4 + len(torch.where(first > second)[0]) % 2]

    with pytest.raises(TraceError, match=r"reads values of the features \(where\).* such as model\.backbone"):
        trace(CountsAHalf(4), SIZE)


def test_a_model_that_returns_no_tensor_is_refused() -> None:
    class Text(Classifier):
        def forward(self, x: Tensor) -> Any:
            return {"label": "cat"}

    with pytest.raises(TraceError, match="the model returns dict, in which no tensor was found"):
        trace(Text(4), SIZE)


# Helpers --------------------------------------------------------------------------------------------------------------


def test_a_copy_sharing_tensors_is_another_tree_with_the_same_tensors() -> None:
    model = TOYS["Plain"].build()
    copied = copy_sharing_tensors(model)
    assert copied is not model
    assert copied.a is not model.a
    assert all(a is b for a, b in zip(copied.parameters(), model.parameters(), strict=True))
    assert all(a is b for a, b in zip(copied.buffers(), model.buffers(), strict=True))


def test_the_image_size_is_what_the_model_declares_or_224() -> None:
    assert default_input_size(nn.Sequential(nn.Conv2d(1, 4, 3))) == (1, 224, 224)
    assert default_input_size(nn.Linear(2, 2)) == (3, 224, 224)
    model = nn.Conv2d(3, 4, 3)
    model.pretrained_cfg = {"input_size": (3, 96, 128)}
    assert default_input_size(model) == (3, 96, 128)
    model.in_chans = 1
    assert default_input_size(model) == (1, 96, 128)


def test_the_recording_holds_shapes_and_the_output_size() -> None:
    recorded = trace(TOYS["Plain"].build(), SIZE)
    assert recorded.output_size == (1, 5)
    assert tuple(aten.value_of(recorded.image).shape) == (1, *SIZE)
    assert trace(TOYS["TwoOutputs"].build(), SIZE).output_size is None
