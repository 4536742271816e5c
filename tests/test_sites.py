"""The plan: which convolutions get a gate, where it sits, and what is left alone and why."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from torch import nn

import decouplify
from decouplify.errors import PlanError
from decouplify.plan import End, Plan
from toynets import FIRST, SIZE, TOYS


def plan_of(name: str, **options: object) -> Plan:
    return decouplify.inspect(TOYS[name].build(), SIZE, **{**TOYS[name].options, **options})


def gates_of(plan: Plan) -> dict[str, list[str]]:
    return {gate.name: list(gate.sites) for gate in plan.gates}


def place(end: End) -> str:
    return end.module if end.after is None else f"{end.module} after {end.after}"


def reasons_of(plan: Plan) -> dict[str, str]:
    return {refusal.name: refusal.reason for refusal in plan.refused}


# Every toy network ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOYS)
def test_gates_sites_and_ends_are_the_expected_ones_in_execution_order(name: str) -> None:
    plan = plan_of(name)
    found = [(gate.name, (list(gate.sites), [place(end) for end in gate.ends])) for gate in plan.gates]
    assert found == list(TOYS[name].gates.items())


@pytest.mark.parametrize("name", TOYS)
def test_every_other_convolution_is_refused_with_its_reason(name: str) -> None:
    assert reasons_of(plan_of(name)) == TOYS[name].refused


@pytest.mark.parametrize("name", TOYS)
def test_sites_and_refusals_are_all_convolutions_of_the_model(name: str) -> None:
    plan, model = plan_of(name), TOYS[name].build()
    known = {site.name for site in plan.sites} | reasons_of(plan).keys()
    assert {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)} <= known


@pytest.mark.parametrize("name", TOYS)
def test_numbers_of_a_site_are_those_of_its_module(name: str) -> None:
    plan, model = plan_of(name), TOYS[name].build()
    assert plan.n_filters == sum(gate.n_filters for gate in plan.gates)
    for site in plan.sites:
        module = model.get_submodule(site.name)
        if isinstance(module, nn.Conv2d):
            expected = ("conv", module.in_channels, module.out_channels, module.kernel_size, module.groups)
        else:
            expected = ("linear", module.in_features, module.out_features, (), 1)
        assert (site.kind, site.in_channels, site.out_channels, site.kernel_size, site.groups) == expected
        gate = next(gate for gate in plan.gates if gate.name == site.gate)
        assert (site.name in gate.sites, site.end in gate.ends) == (True, True)
        assert gate.n_filters == site.out_channels


# Details of ends and gates --------------------------------------------------------------------------------------------


def test_a_norm_over_channels_keeps_closed_filters_computed() -> None:
    skips = {site.name: site.skips for name in ("OtherNorms", "LayerNormPermuted") for site in plan_of(name).sites}
    assert skips == {"conv1": False, "conv2": True, "conv3": True, "conv": False, "after.0": True}


def test_ends_know_whether_their_features_are_non_negative() -> None:
    def non_negative(name: str) -> dict[str, bool]:
        return {place(end): end.non_negative for gate in plan_of(name).gates for end in gate.ends}

    assert non_negative("SharedRelu") == {"relu after bn1": True, "bn2": False}
    assert non_negative("NoNorm") == {"act": False, "conv2": False}
    assert non_negative("SigmoidActivation") == {"act1": True, "act2": True, "after.2": True}


def test_an_end_before_a_rectifier_that_no_hook_reaches_says_so() -> None:
    def before_relu(name: str) -> list[str]:
        return [place(end) for gate in plan_of(name).gates for end in gate.ends if end.before_relu]

    assert before_relu("UnreachableRelu") == ["bn"]
    assert [before_relu(name) for name in ("Plain", "SharedRelu", "FunctionalRelu")] == [[], [], []]


def test_axes_follow_permutes() -> None:
    axes = {gate.name: (gate.input_axis, [end.axis for end in gate.ends]) for gate in plan_of("LinearOnMaps").gates}
    assert axes == {"conv": (1, [1]), "expand": (-1, [-1]), "project": (-1, [-1])}
    assert [end.axis for gate in plan_of("LayerNormPermuted").gates for end in gate.ends] == [-1, 1]


def test_linear_layers_on_maps_are_gated_only_on_request() -> None:
    assert gates_of(plan_of("LinearOnMaps", linear_as_conv=False)) == {"conv": ["conv"]}


def test_a_depthwise_convolution_gets_its_own_gate_when_its_producer_has_none() -> None:
    plan = plan_of("DepthwiseChain", exclude="expand.0")
    assert gates_of(plan) == {"depthwise": ["depthwise"], "project.0": ["project.0"], "last": ["last"]}


def test_parallel_branches_of_which_one_is_excluded_are_gated_one_by_one() -> None:
    plan = plan_of("ParallelBranches", exclude="dense.0")
    assert gates_of(plan) == {"pointwise.0": ["pointwise.0"], "after.0": ["after.0"]}
    assert place(plan.gates[0].ends[0]) == "pointwise.1"


def test_classes_are_read_off_the_output() -> None:
    assert {name: plan_of(name).n_classes for name in ("Plain", "TwoOutputs", "DictOutput")} == {
        "Plain": 5,
        "TwoOutputs": None,
        "DictOutput": None,
    }


# Options --------------------------------------------------------------------------------------------------------------


def test_skip_first_spares_all_that_read_the_image_through_light_operators() -> None:
    assert gates_of(plan_of("ImageInPlace", skip_first=False)) == {"stem.0": ["stem.0"], "a.0": ["a.0"], "b.0": ["b.0"]}


def test_skip_last_spares_the_last_convolution_that_could_be_gated() -> None:
    plan = plan_of("OtherConvs", skip_last=True)
    assert gates_of(plan) == {"a.0": ["a.0"]}
    assert reasons_of(plan)["b.0"] == "last convolution (skip_last)"


ONLY, EXCLUDE = "not in only=", "in exclude="


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        ({"only": "a.0"}, {"b.0": ONLY, "c.0": ONLY}),
        ({"only": ["a.*", "c.*"]}, {"b.0": ONLY}),
        ({"exclude": "a.*"}, {"a.0": EXCLUDE}),
        ({"exclude": ("a.0", "b.0")}, {"a.0": EXCLUDE, "b.0": EXCLUDE}),
        ({"only": "[ab].0", "exclude": "b*"}, {"b.0": EXCLUDE, "c.0": ONLY}),
    ],
)
def test_only_and_exclude_take_names_and_globs(options: dict[str, object], refused: dict[str, str]) -> None:
    plan = plan_of("DenseConcat", **options)
    assert reasons_of(plan) == {"stem.0": FIRST, **refused}
    assert [gate.name for gate in plan.gates] == [name for name in ("a.0", "b.0", "c.0") if name not in refused]


def test_a_reason_in_the_structure_comes_before_a_wish() -> None:
    assert reasons_of(plan_of("Plain", only="b.0"))["stem.0"] == FIRST


@pytest.mark.parametrize("option", ["only", "exclude"])
def test_a_glob_that_matches_nothing_is_an_error(option: str) -> None:
    match = rf"{option}='layer\*' matches no convolution of the model; it has: stem.0, a.0, b.0"
    with pytest.raises(PlanError, match=match):
        plan_of("Plain", **{option: ["a.0", "layer*"]})


def test_options_are_part_of_the_plan() -> None:
    options = plan_of("Plain", reduction=2, bias=1, input_norm=True, only="a.0").options
    assert (options.reduction, options.bias, options.input_norm, options.only) == (2, 1.0, True, ("a.0",))


# The plan as an object ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOYS)
def test_a_plan_survives_json(name: str) -> None:
    plan = plan_of(name)
    again = Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan
    assert again.digest() == plan.digest()


def test_the_digest_is_the_same_for_equal_plans_and_differs_for_others() -> None:
    plans = [plan_of("Plain"), plan_of("Plain", reduction=2), plan_of("Plain", only="a.0"), plan_of("NoNorm")]
    assert len({plan.digest() for plan in plans}) == 4
    assert plan_of("Plain").digest() == plans[0].digest()
    assert replace(plans[0], n_classes=6).digest() != plans[0].digest()
    assert len(plans[0].digest()) == 16


def test_the_gated_share_is_that_of_multiply_accumulates() -> None:
    plan = plan_of("Plain")
    stem, a, b, fc = 8 * 8 * 8 * 3 * 9, 8 * 8 * 8 * 8 * 9, 4 * 4 * 8 * 8 * 9, 8 * 5
    assert plan.n_macs == stem + a + b + fc
    assert [site.n_macs for site in plan.sites] == [a, b]
    assert [refusal.n_macs for refusal in plan.refused] == [stem]
    assert plan.gated_share == pytest.approx((a + b) / (stem + a + b + fc))


def test_a_printed_plan_is_a_table_of_sites_and_refusals() -> None:
    assert str(plan_of("Plain")) == (
        "Plain on (3, 16, 16): 2 of 3 convolutions gated by 2 controllers, 16 filters, 76.9 % of 59.94 kMACs\n"
        "site  conv      MACs %  gate  sits at\n"
        "-------------------------------------\n"
        "a.0   3x3 8->8  61.50   own   a.2\n"
        "b.0   3x3 8->8  15.37   own   b.2\n"
        "\n"
        "left alone  MACs %  reason\n"
        "--------------------------\n"
        "stem.0      23.06   first convolution (skip_first)"
    )


def test_a_printed_plan_names_what_is_special() -> None:
    assert "of expand.0  act" in str(plan_of("DepthwiseChain"))
    assert "3x3 16->16 dw" in str(plan_of("DepthwiseChain"))
    assert "3x3 8->8 g2" in str(plan_of("Grouped"))
    assert "linear 8->16" in str(plan_of("LinearOnMaps"))
    assert "relu (only after bn1)" in str(plan_of("SharedRelu"))
    assert "own (computed anyway: norm over channels)" in str(plan_of("OtherNorms"))


def test_inspecting_changes_nothing() -> None:
    model = TOYS["Plain"].build()
    keys, hooks = list(model.state_dict()), [len(m._forward_hooks) for m in model.modules()]
    decouplify.inspect(model, SIZE)
    assert list(model.state_dict()) == keys
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
