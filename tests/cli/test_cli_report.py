from __future__ import annotations

import base64
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

import decouplify
from decouplify.paths import PathSet
from decouplify.report import headline_facts, macs_of_paths, report

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

VOID = {"meta", "img", "br", "link", "hr"}


class Page(HTMLParser):
    """Checks that elements are closed in order, and collects what the tests ask about."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text += data

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]


@pytest.fixture(scope="module")
def model():
    """A network with random gates, half of them open."""
    torch.manual_seed(0)
    model = decouplify.wrap(timm.create_model("test_byobnet", num_classes=3, in_chans=1), (1, 32, 32))
    for controller in model.decoupling.controllers.values():
        torch.nn.init.normal_(controller.fc2.weight)
        torch.nn.init.normal_(controller.fc2.bias, std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(40, 1, 32, 32, generator=generator) * torch.linspace(0.2, 3, 40)[:, None, None, None]
    return images, torch.arange(40) % 3


@pytest.fixture(scope="module")
def page(model, batch, tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "page.html"
    names = ["cat & dog", "<b>", 'a "b"']
    facts = {"<script>": "1 < 2"}
    made = report(model, *batch, out, title="A <title>", class_names=names, timings={"dense": 1.234}, facts=facts)
    assert made == out.resolve()
    return Page(out.read_text(encoding="utf-8"))


def test_macs_of_recorded_paths_are_those_of_the_images(model, batch):
    counted = decouplify.count_macs(model, batch[0])
    paths = decouplify.record(model, [batch])
    macs = macs_of_paths(model, paths)
    assert torch.equal(macs.executed, counted.executed)
    assert (macs.dense, macs.controllers) == (counted.dense, counted.controllers)
    assert len(set(macs.executed.tolist())) > 5
    with pytest.raises(ValueError, match="does not belong to this ByobNet"):
        macs_of_paths(model, paths.select_layers([0, 1]))


def test_the_headline_states_each_number_and_what_it_was_measured_on(model, batch):
    paths = decouplify.record(model, [batch])
    facts = {fact.name: fact for fact in headline_facts(paths, macs_of_paths(model, paths))}
    assert facts["Images"].value == "40"
    assert facts["Accuracy"].value == f"{100 * (paths.preds == paths.labels).mean():.1f} %"
    assert facts["MAC reduction"].value == f"{decouplify.count_macs(model, batch[0]).reduction:.2f}x"
    assert facts["Filters"].value == paths.filter_states().headline().removesuffix(" on 40 images")
    assert facts["Filters"].note == f"{paths.n_filters} on 40 images"
    assert facts["Distinct paths"].value == f"{paths.distinct()} of 40"
    assert facts["Class told by the path"].value == f"{100 * paths.knn_accuracy(10):.1f} %"
    assert "the largest class holds 35.0 %" in facts["Class told by the path"].note


def test_numbers_that_do_not_exist_are_left_out(model, batch):
    paths = decouplify.record(model, [batch[0][:2]])
    names = [fact.name for fact in headline_facts(paths, macs_of_paths(model, paths))]
    assert names == ["Images", "MAC reduction", "Filters", "Distinct paths"]
    same = decouplify.record(model, [(batch[0][:1].expand(9, -1, -1, -1), batch[1][:9])])
    assert "Class told by the path" not in [fact.name for fact in headline_facts(same, macs_of_paths(model, same))]


def test_the_page_holds_what_it_promises(page, model):
    for heading in ("In numbers", "Paths as a map", "States of the filters", "Gated convolutions", "Work per image"):
        assert heading in page.text
    for site in model.decoupling.plan.sites:
        assert site.name in page.text
        assert site.description in page.text
    for refusal in model.decoupling.plan.refused:
        assert refusal.reason in page.text
    assert "PCA of 40 images" in page.text
    assert "t-SNE of 40 images" in page.text
    assert "dense 1.23 ms" in page.text


def test_what_comes_from_outside_stays_text(page):
    assert page.all("script") == page.all("b") == []
    for text in ("A <title>", "cat & dog", "<b>", 'a "b"', "<script>1 < 2"):
        assert text in page.text


def test_the_page_needs_nothing_from_elsewhere(page):
    assert page.all("link") == []
    sources = [attrs["src"] for attrs in page.all("img")]
    assert len(sources) == 4 + 12
    for source in sources:
        assert base64.b64decode(source.removeprefix("data:image/png;base64,"), validate=True).startswith(b"\x89PNG")
    assert not [attrs for _, attrs in page.elements if {"href", "srcset", "onclick"} & attrs.keys()]
    policy = next(attrs["content"] for attrs in page.all("meta") if "http-equiv" in attrs)
    assert policy.startswith("default-src 'none'")


def test_the_page_can_be_read_without_seeing_it(page):
    assert all(len(attrs["alt"]) > 10 for attrs in page.all("img"))
    assert page.all("html") == [{"lang": "en"}]
    headings = [tag for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == "h1"
    assert headings.count("h1") == 1
    assert "h3" not in headings[: headings.index("h2")]
    assert all(attrs.get("scope") in ("row", "col") for attrs in page.all("th"))
    for attrs in page.all("div"):
        if attrs.get("class") == "scroll":
            assert attrs["aria-label"]
            assert attrs["tabindex"] == "0"
    ids = {attrs["id"] for _, attrs in page.elements if "id" in attrs}
    assert {attrs["aria-labelledby"] for _, attrs in page.elements if "aria-labelledby" in attrs} <= ids


def test_the_cheapest_and_the_dearest_images_are_shown(page, model, batch):
    share = 100 * decouplify.count_macs(model, batch[0]).executed.double() / model.decoupling.costs.n_dense
    cheapest, dearest = page.text.split("The cheapest images")[1].split("The dearest images")
    ends = share.sort().values
    assert re.findall(r"([\d.]+) %", cheapest) == [f"{x:.1f}" for x in ends[:6]]
    assert re.findall(r"([\d.]+) %", dearest) == [f"{x:.1f}" for x in ends.flip(0)[:6]]


def test_one_image_is_enough(model, batch, tmp_path):
    made = report(model, batch[0][:1], batch[1][:1], tmp_path / "one.html")
    assert "1 of 1" in Page(made.read_text()).text


def test_recorded_paths_and_pictures_can_be_given(model, batch, tmp_path):
    images, labels = batch
    paths = decouplify.record(model, [images])
    pictures = np.zeros((40, 8, 8, 3), np.uint8)
    made = report(model, images, labels, tmp_path / "page.html", paths=paths, pictures=pictures)
    assert "Class told by the path" in made.read_text()  # the labels given stand in for those the paths lack


def test_what_does_not_fit_is_refused_and_leaves_no_file(model, batch, tmp_path):
    images, labels = batch
    out = tmp_path / "page.html"
    with pytest.raises(ValueError, match="report: 40 images, 39 labels, 40 paths, 40 pictures given; equally many"):
        report(model, images, labels[:39], out)
    with pytest.raises(ValueError, match="0 images"):
        report(model, images[:0], labels[:0], out)
    with pytest.raises(ValueError, match="report: ByobNet is not wrapped"):
        report(timm.create_model("test_byobnet"), images, labels, out)
    with pytest.raises(ValueError, match="does not belong to this ByobNet"):
        report(model, images, labels, out, paths=PathSet.from_gates({"a": np.zeros((40, 3))}))
    with pytest.raises(FileNotFoundError, match="report: there is no directory"):
        report(model, images, labels, tmp_path / "no" / "page.html")
    assert not list(tmp_path.iterdir())


def test_an_interrupted_write_leaves_the_old_page_and_nothing_else(model, batch, tmp_path, monkeypatch):
    out = tmp_path / "page.html"
    out.write_text("old")

    def fail(*args):
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        report(model, *batch, out)
    assert out.read_text() == "old"
    assert list(tmp_path.iterdir()) == [out]


def test_without_matplotlib_the_extra_is_named(model, batch, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'needs matplotlib; install it with: pip install "decouplify\[analysis\]"'):
        report(model, *batch, tmp_path / "page.html")
    assert not list(tmp_path.iterdir())
