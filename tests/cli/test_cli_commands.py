from __future__ import annotations

import json
import logging
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import decouplify
from decouplify import cli
from decouplify._commands import app
from decouplify.checkpoint import read_record
from decouplify.data import load_images
from decouplify.paths import PathSet
from decouplify.registry import build_model, rebuild_model

SPEC = "timm:test_resnet"  # the network of the checkpoint


def error_line(result) -> str:
    """The only line on stderr; there is nothing on stdout and no traceback anywhere."""
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert result.stderr.count("\n") == 1
    return result.stderr.strip()


# the entry point


def test_version(run):
    assert run("--version").stdout == f"decouplify {decouplify.__version__}\n"


def test_the_library_imports_neither_typer_nor_rich():
    code = "import sys, decouplify, decouplify.cli; sys.exit(bool({'typer', 'rich'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_a_missing_package_is_answered_with_the_extra_that_brings_it(monkeypatch, capsys, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert capsys.readouterr().err == f'error: the command line needs {package}; pip install "decouplify[cli]"\n'


def test_main_runs_the_command_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["decouplify", "inspect", "timm:no_such_net"])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert capsys.readouterr().err.startswith("error: timm has no model 'no_such_net'")


def test_debug_shows_where_an_error_comes_from(run):
    from typer.testing import CliRunner

    result = CliRunner().invoke(app, ["--debug", "inspect", "timm:no_such_net"])
    assert isinstance(result.exception, ValueError)
    assert "has no model" in str(result.exception)


def test_wrong_usage_ends_with_exit_code_2_as_well(run):
    assert "Missing argument" in run("inspect", exit_code=2).stderr
    assert "No such command" in run("benchmark", exit_code=2).stderr


# inspect


def test_inspect_prints_sites_refusals_and_totals(run):
    text = run("inspect", SPEC, "--input-size", "1,32,32").stdout
    plan = decouplify.inspect(build_model(SPEC, in_chans=1), (1, 32, 32))
    for site in plan.sites:
        assert re.search(rf"│ {re.escape(site.name)} +│ {re.escape(site.description)} ", text)
    for refusal in plan.refused:
        assert re.search(rf"│ {re.escape(refusal.name)} .*{re.escape(refusal.reason)} ", text)
    assert f"13 of 15 convolutions gated by 13 controllers, {plan.n_filters} filters, 96.3 % of 4.1 M MACs" in text


def test_inspect_prints_one_json_document(run):
    options = ("--num-classes", 7, "--only", "layer1*", "--only", "layer2*", "--exclude", "*conv2")
    document = json.loads(run("inspect", SPEC, "--input-size", "3,64,64", *options, "--json").stdout)
    assert document["spec"] == SPEC
    assert document["n_classes"] == 7
    assert document["input_size"] == [3, 64, 64]
    assert [gate["name"] for gate in document["gates"]] == ["layer1.0.conv1", "layer2.0.conv1", "layer2.0.downsample.1"]
    assert document["n_filters"] == sum(gate["n_filters"] for gate in document["gates"])
    globs = {"only": ["layer1*", "layer2*"], "exclude": ["*conv2"]}
    plan = decouplify.inspect(build_model(SPEC, num_classes=7), (3, 64, 64), **globs)
    assert document["gated_share"] == pytest.approx(plan.gated_share)
    del document["spec"], document["n_filters"], document["gated_share"]
    assert decouplify.Plan.from_dict(document) == plan


def test_inspect_can_gate_linear_layers(run):
    args = ("inspect", "timm:test_convnext", "--input-size", "3,64,64", "--json")
    without, with_linear = (json.loads(run(*args, *more).stdout) for more in ((), ("--linear-as-conv",)))
    assert "linear" not in {site["kind"] for site in without["sites"]}
    assert "linear" in {site["kind"] for site in with_linear["sites"]}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("timm:test_resnt",), r"error: timm has no model 'test_resnt'; did you mean timm:test_resnet"),
        ((SPEC, "--input-size", "3,224"), "error: --input-size 3,224: wanted three positive integers C,H,W"),
        ((SPEC, "--input-size", "3,a,b"), "error: --input-size 3,a,b: wanted three positive integers"),
        (("timm:test_vit3", "--input-size", "3,32,32"), "error: VisionTransformer does not run on one image of size"),
        ((SPEC, "--only", "nothing*"), r"error: .*nothing\*"),
    ],
)
def test_inspect_answers_a_mistake_with_one_line(run, args, message):
    assert re.match(message, error_line(run("inspect", *args, exit_code=2)))


def test_torch_does_not_log_a_traceback_beside_the_line(run):
    """Its logger writes to the stderr of the process, so it is asked directly."""
    logged = []
    handler = logging.Handler()
    handler.emit = logged.append
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.addHandler(handler)
    try:
        result = run("inspect", "timm:test_coatnet", "--input-size", "3,32,32", exit_code=2)
    finally:
        logger.removeHandler(handler)
    assert re.match("error: MaxxVit does not run on one image of size", error_line(result))
    assert logged == []
    assert logger.level == level


# train


def test_train_prints_one_json_document_and_writes_a_checkpoint(trained):
    printed = trained.printed
    assert printed["out"] == str(trained.checkpoint)
    assert printed["model"] == SPEC
    assert printed["model_kwargs"] == {"num_classes": 3, "in_chans": 1}
    assert [len(phase) for phase in printed["history"].values()] == [1, 1]
    assert printed["test"]["n_images"] == 20
    assert printed["accuracy"]["decoupled"] == printed["test"]["accuracy"]
    assert printed["target"] == "2.0x"
    extra = read_record(trained.checkpoint)["extra"]
    assert extra == {name: printed[name] for name in extra}
    assert extra["classes"] == ["upright", "lying", "<both>"]
    # One epoch cannot get there, and the user is told; nothing else is on stderr.
    assert trained.stderr.startswith(f"note: {printed['macs']['reduction']:.2f}x instead of 2.0x: train for more")


def test_a_checkpoint_gives_the_network_that_was_trained(trained):
    extra = read_record(trained.checkpoint)["extra"]
    model = decouplify.load(rebuild_model(extra), trained.checkpoint).eval()
    images, labels = load_images(trained.data).normalised_as(extra["mean"], extra["std"]).tensors("test")
    with torch.no_grad():
        accuracy = (model(images).argmax(1) == labels).float().mean().item()
    assert accuracy == pytest.approx(trained.printed["accuracy"]["decoupled"])
    assert decouplify.count_macs(model, images).reduction == pytest.approx(extra["macs"]["reduction"])


def test_train_prints_a_table_and_a_line_per_epoch(run, trained, tmp_path):
    out = tmp_path / "again.safetensors"
    options = ("--epochs", 0, "--decouple-epochs", 1, "--target", "none", "--batch-size", 40, "--device", "cpu")
    options += ("--only", "layer[12]*", "--exclude", "*conv2")
    result = run("train", SPEC, "--data", trained.data, "--out", out, "--size", 16, *options)
    assert re.fullmatch(r"decoupling 1/1: loss [\d.]+, accuracy [\d.]+ %, open \d+ %\n", result.stderr)
    assert "Accuracy before decoupling" in result.stdout
    assert "MAC reduction" in result.stdout
    plan = read_record(out)["plan"]
    assert plan["input_size"] == [1, 16, 16]
    assert [gate["name"] for gate in plan["gates"]] == ["layer1.0.conv1", "layer2.0.conv1", "layer2.0.downsample.1"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--data", "nowhere.npz"), "error: no data at nowhere.npz"),
        (("--target", "0.5x"), "error: target='0.5x': a MAC reduction is written like"),
        (("--target", "half"), "error: target='half': a MAC reduction is written like"),
        (("--target", "1.5"), "error: target=1.5: the keep ratio 1.5 is not in"),
        (("--out", "/no/such/directory/x.safetensors"), "error: --out /no/such/directory/x.safetensors: there is no"),
        (("--sparsity", "-1"), "error: DecouplingRecipe: sparsity=-1.0; a number >= 0 wanted"),
        (("--only", "nothing*"), r"error: .*nothing\*"),
        (("--device", "abacus"), "error: .*abacus"),
        (("--channels", "2"), "error: channels is 2, wanted 1 or 3"),
    ],
)
def test_train_answers_a_mistake_with_one_line_before_it_trains(run, trained, tmp_path, options, message):
    given = {"--data": trained.data, "--out": tmp_path / "x.safetensors", "--epochs": 10**6, "--decouple-epochs": 1}
    given |= {"--batch-size": 40, options[0]: options[1]}
    result = run("train", SPEC, *(part for item in given.items() for part in item), exit_code=2)
    assert re.match(message, error_line(result))
    assert not list(tmp_path.iterdir())


def test_train_looks_at_the_target_before_it_spends_time(run, tmp_path):
    result = run("train", SPEC, "--data", "nowhere.npz", "--out", tmp_path / "x", "--target", "2", exit_code=2)
    assert error_line(result).startswith("error: target=2.0: the keep ratio 2.0")


# record


def test_record_writes_paths_and_prints_one_json_document(run, trained, tmp_path):
    out = tmp_path / "paths"
    document = json.loads(run("record", trained.checkpoint, "--data", trained.data, "--out", out, "--json").stdout)
    assert {name: document[name] for name in trained.printed["test"]} == trained.printed["test"]
    paths = PathSet.load(out)
    assert len(paths) == document["n_images"] == 20
    assert paths.ids.tolist() == list(range(20))
    assert document["distinct_paths"] == paths.distinct()
    states = paths.filter_states().totals
    assert {name: document["filters"][name] for name in states} == states
    assert document["knn"] == {"k": 10, "accuracy": paths.knn_accuracy(10)}
    assert len(document["layers"]) == len(paths.layers)


def test_record_prints_tables(run, trained, tmp_path):
    out = tmp_path / "paths"
    text = run("record", trained.checkpoint, "--data", trained.data, "--out", out, "--split", "train").stdout
    for part in ("layer4.0.conv2", "MAC reduction", "Distinct paths", "80", str(out)):
        assert part in text


def test_record_answers_a_mistake_with_one_line(run, trained, tmp_path):
    def message(checkpoint=trained.checkpoint, data=trained.data, out=tmp_path / "paths"):
        return error_line(run("record", checkpoint, "--data", data, "--out", out, exit_code=2))

    assert message(checkpoint=tmp_path / "none").startswith("error: no checkpoint at")
    assert "is not a safetensors file" in message(checkpoint=trained.data)
    assert message(data="digits").endswith("has 10 (0, 1, 2, 3, ...); wanted the same classes in the same order")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    assert "full" in message(out=tmp_path / "full")
    assert (tmp_path / "full" / "letter.txt").read_text() == "mine"


def test_a_checkpoint_saved_from_python_may_not_say_how_to_build_its_network(run, trained, tmp_path):
    model = decouplify.wrap(build_model(SPEC, in_chans=1), (1, 32, 32))
    decouplify.save(model, tmp_path / "plain.safetensors")
    result = run("record", tmp_path / "plain.safetensors", "--data", trained.data, "--out", tmp_path, exit_code=2)
    assert error_line(result).startswith("error: the checkpoint does not say how to build its network")


def test_images_are_read_as_in_training(run, trained, tmp_path):
    """Statistics come from the checkpoint: the same test images beside other training images give the same paths."""
    images = load_images(trained.data)
    other = tmp_path / "other.npz"
    names = np.array(images.class_names)
    arrays = {"images": images.train_images // 4, "labels": images.train_labels, "class_names": names}
    np.savez(other, **arrays, test_images=images.test_images, test_labels=images.test_labels)
    document = json.loads(run("record", trained.checkpoint, "--data", other, "--out", tmp_path / "p", "--json").stdout)
    assert {name: document[name] for name in trained.printed["test"]} == trained.printed["test"]


# report


def test_report_writes_one_page(run, trained, tmp_path):
    out = tmp_path / "page.html"
    text = run("report", trained.checkpoint, "--data", trained.data, "--out", out).stdout
    assert text == f"report: {out}\n"
    page = out.read_text()
    assert f"<h1>{SPEC} on bars.npz</h1>" in page
    assert "Accuracy before decoupling" in page
    assert "&lt;both&gt;" in page
    assert "<both>" not in page
    assert "Time per image" not in page


def test_report_prints_one_json_document_with_timings_when_asked(run, trained, tmp_path):
    out = tmp_path / "page.html"
    options = ("--split", "train", "--timings", "--json")
    document = json.loads(run("report", trained.checkpoint, "--data", trained.data, "--out", out, *options).stdout)
    assert document["out"] == str(out)
    assert document["n_images"] == 80
    assert set(document["timings_ms"]) == {"dense", "sparse"}
    assert min(document["timings_ms"].values()) > 0
    page = out.read_text()
    assert f"dense {document['timings_ms']['dense']:.2f} ms" in page
    assert "median of 20 images" in page
    assert "Accuracy before decoupling" not in page  # it was measured on the other images


def test_report_does_not_compare_with_an_accuracy_on_other_images(run, trained, tmp_path):
    other, out = shutil.copy(trained.data, tmp_path / "other.npz"), tmp_path / "page.html"
    run("report", trained.checkpoint, "--data", other, "--out", out)
    assert "Accuracy before decoupling" not in out.read_text()


def test_report_answers_a_mistake_with_one_line(run, trained, tmp_path):
    result = run("report", trained.checkpoint, "--data", trained.data, "--out", tmp_path / "no" / "x.html", exit_code=2)
    assert error_line(result).startswith("error: report: there is no directory")


# bench


def test_bench_times_a_network_of_a_registry(run):
    options = ("--input-size", "3,32,32", "--keep", 0.5, "--rounds", 3, "--runtime", "eager", "--json")
    printed = json.loads(run("bench", SPEC, *options).stdout)
    assert printed["model"] == SPEC
    assert printed["mac_reduction"] > 1
    assert [t["name"] for t in printed["timings"]][:2] == ["eager", "decouplify"]


def test_bench_times_a_checkpoint_with_its_own_gates(run, trained):
    options = ("--data", trained.data, "--rounds", 3, "--runtime", "eager")
    text = run("bench", trained.checkpoint, *options).stdout
    assert "of the model's own controllers" in text
    assert "the speed of eager" in text


def test_bench_refuses_what_does_not_fit(run, trained):
    assert "give some with --data" in run("bench", trained.checkpoint, exit_code=2).stderr
    result = run("bench", trained.checkpoint, "--data", trained.data, "--keep", 0.5, exit_code=2)
    assert "has gates of its own" in result.stderr
    assert "wanted numbers of cores" in run("bench", SPEC, "--cores", "a", exit_code=2).stderr
    sized = run("bench", trained.checkpoint, "--data", trained.data, "--input-size", "3,8,8", exit_code=2)
    assert "as large as they are" in sized.stderr
    assert "runs on random images" in run("bench", SPEC, "--data", trained.data, exit_code=2).stderr
    assert "no checkpoint at absent.safetensors" in run("bench", "absent.safetensors", exit_code=2).stderr
