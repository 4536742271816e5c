from __future__ import annotations

import base64
import html
import io
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

import decouplify
from decouplify.paths import macs_of_paths
from decouplify.reporting import headline_facts, report

pytest.importorskip("plotly")
pytest.importorskip("sklearn")

VOID = {"meta", "img", "br", "link", "hr"}


class Page(HTMLParser):
    """Checks that elements are closed in order, and collects what the tests ask about."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[str] = []
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
        if self.open[-1:] == ["script"]:
            self.scripts.append(data)
        elif self.open[-1:] != ["style"]:
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
    options = {"class_names": names, "timings": {"dense": 1.234}, "facts": facts, "progress": False}
    made = report(model, [batch], out, title="A <title>", **options)
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
    headings = ("In numbers", "Paths as a map", "Where paths part", "Filters that tell", "States of the filters")
    for heading in (*headings, "Gated convolutions", "Work per image"):
        assert heading in page.text
    for site in model.decoupling.plan.sites:
        assert site.name in page.text
        assert site.description in page.text
    for refusal in model.decoupling.plan.refused:
        assert refusal.reason in page.text
    assert "t-SNE of 40 images" in page.text
    assert "dense 1.23 ms" in page.text


def figures(page):
    """The charts as the page's script reads them."""
    return json.loads(page.scripts[0])


def test_the_charts_show_the_numbers(page, model, batch):
    charts = figures(page)
    names = ["chart-map", "chart-states", "chart-histogram", "chart-macs", "chart-information", "chart-tree"]
    assert list(charts) == names
    assert {attrs["id"] for attrs in page.all("div") if "chart" in (attrs.get("class") or "")} == set(names)
    paths = decouplify.record(model, [batch])
    dots = charts["chart-map"]["data"]
    assert sum(len(trace["x"]) for trace in dots) == 40
    wrong = sum(len(trace["x"]) for trace in dots if trace["marker"]["symbol"] == "x")
    assert wrong == (paths.preds != paths.labels).sum()
    assert sorted(place for trace in dots for place, _ in trace["customdata"]) == list(range(40))  # a picture each
    heights = {trace["name"]: trace["y"] for trace in charts["chart-states"]["data"]}
    first = paths.filter_states().layers[0]
    assert heights["dynamic"][0] == pytest.approx(100 * first.n_dynamic / first.n_filters)
    assert sum(charts["chart-macs"]["data"][0]["y"]) == 40


def test_the_most_telling_filters_are_shown_with_the_images_that_open_them_widest(page, model, batch):
    from decouplify.paths import class_information

    paths = decouplify.record(model, [batch], margins=True)
    layer, index, bits = class_information(paths).best(1)[0]
    assert f"{layer}, filter {index}" in page.text
    assert f"{bits:.3f} bits about the class" in page.text
    column = paths.filter_slices[layer].start + index
    widest = int(paths.margins[:, column].argmax())
    first_card = page.text.split(f"{layer}, filter {index}")[-1]
    assert ["cat & dog", "<b>", 'a "b"'][widest % 3] in first_card


def test_what_comes_from_outside_stays_text(page):
    assert page.all("b") == []
    assert len(page.all("script")) == len(page.scripts) == 3  # the figures, the library, the page's own
    for text in ("A <title>", "cat & dog", "<b>", 'a "b"', "<script>1 < 2"):
        assert text in page.text
    assert "<" not in page.scripts[0]
    assert {trace["name"] for trace in figures(page)["chart-map"]["data"]} == {"cat &amp; dog", "&lt;b&gt;", 'a "b"'}


def test_the_page_needs_nothing_from_elsewhere(page):
    assert page.all("link") == page.all("img") == []
    assert not [attrs for _, attrs in page.elements if {"href", "src", "srcset", "onclick"} & attrs.keys()]
    policy = next(attrs["content"] for attrs in page.all("meta") if "http-equiv" in attrs)
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy


def test_pictures_are_those_of_the_images(model, batch, tmp_path):
    pillow = pytest.importorskip("PIL.Image")
    images = torch.linspace(-1, 1, 40)[:, None, None, None].expand(-1, 1, 32, 32).clone()  # from black to white
    out = report(model, [(images, batch[1])], tmp_path / "page.html", mean=[0.5], std=[0.5], progress=False)
    text = out.read_text()
    found = re.search(r"url\(data:image/webp;base64,([^)]+)\);background-size:700% 600%", text)  # 40 on a 7 x 6 sheet
    sheet = np.asarray(pillow.open(io.BytesIO(base64.b64decode(found[1], validate=True))).convert("L"))
    assert sheet.shape == (6 * 32, 7 * 32)
    for trace in figures(Page(text))["chart-map"]["data"]:
        for place, words in trace["customdata"]:
            assert words
            line, column = divmod(place, 7)
            tile = sheet[32 * line + 4 : 32 * line + 28, 32 * column + 4 : 32 * column + 28]
            assert tile.std() < 3
    brightness = sorted(sheet[32 * (i // 7) + 16, 32 * (i % 7) + 16] for i in range(40))
    np.testing.assert_allclose(brightness, np.linspace(0, 255, 40), atol=4)


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_draws_every_chart_in_the_readers_colours(model, batch, tmp_path, dark):
    out = report(model, [batch], tmp_path / "page.html", progress=False)
    probe = """<script>
        const map = document.getElementById("chart-map");
        map.scrollIntoView();
        const point = () => {
            const dot = map.querySelector(".point").getBoundingClientRect();
            const at = { clientX: dot.x + dot.width / 2, clientY: dot.y + dot.height / 2, bubbles: true };
            for (const kind of ["mouseover", "mousemove"])
                map.querySelector(".nsewdrag").dispatchEvent(new MouseEvent(kind, at));
        };
        const look = () => {
            const bar = document.querySelector("#chart-states .bars path");
            const wide = document.documentElement.scrollWidth - innerWidth;
            const card = document.getElementById("hover");
            const shown = card.hidden ? "" : card.textContent + card.querySelector(".tile").style.backgroundPosition;
            const drawn = document.querySelectorAll(".chart .main-svg").length;
            document.title = JSON.stringify([bar.style.fill, wide, drawn, shown]);
        };
        setTimeout(point, 500);
        setTimeout(look, 1000);
    </script></body>"""
    # In a copy: the page itself has nothing to probe it with.
    out.write_text(out.read_text().replace("</body>", probe))
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--virtual-time-budget=5000",
    ]
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    command = [CHROMIUM, *flags, scheme, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", out.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert 'data-drawn="6"' in dom
    fill, overflow, n_drawings, shown = json.loads(html.unescape(re.search("<title>(.*?)</title>", dom)[1]))
    assert fill.replace(" ", "") == ("rgb(127,166,211)" if dark else "rgb(53,88,127)")  # --energetic of each mode
    assert overflow <= 0
    assert n_drawings >= 6
    assert re.fullmatch(r"\d(, taken for \d)?[\d.]+% [\d.]+%", shown)  # the words and the picture of a dot pointed at


def test_the_page_can_be_read_without_seeing_it(page):
    drawn = [attrs for attrs in page.all("div") if attrs.get("role") == "img"]
    assert len(drawn) > 6 + 12
    assert all(len(attrs["aria-label"]) > 8 for attrs in drawn)
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
    made = report(model, [(batch[0][:1], batch[1][:1])], tmp_path / "one.html", progress=False)
    text = Page(made.read_text()).text
    assert "1 of 1" in text
    assert text.count("Left out: all images have the same label.") == 2


def test_without_labels_what_needs_them_is_left_out_with_the_reason(model, batch, tmp_path):
    text = Page(report(model, [batch[0]], tmp_path / "page.html", progress=False).read_text()).text
    assert text.count("Left out: the images have no labels.") == 2
    assert "taken for" in text


def test_images_of_different_sizes_give_a_page_without_pictures(batch, tmp_path):
    torch.manual_seed(0)
    model = decouplify.wrap(timm.create_model("test_byobnet", num_classes=3, in_chans=1), (1, 32, 32)).eval()
    loader = [(batch[0][:8], batch[1][:8]), (batch[0][8:16, :, :24, :24], batch[1][8:16])]
    page = Page(report(model, loader, tmp_path / "page.html", progress=False).read_text())
    assert "The cheapest images" in page.text
    assert all(place == -1 for trace in figures(page)["chart-map"]["data"] for place, _ in trace["customdata"])


def test_what_does_not_fit_is_refused_and_leaves_no_file(model, batch, tmp_path):
    out = tmp_path / "page.html"
    with pytest.raises(ValueError, match="the loader yielded no images"):
        report(model, [], out)
    with pytest.raises(ValueError, match="report: ByobNet is not wrapped"):
        report(timm.create_model("test_byobnet"), [batch], out)
    with pytest.raises(FileNotFoundError, match="report: there is no directory"):
        report(model, [batch], tmp_path / "no" / "page.html")
    assert not list(tmp_path.iterdir())


def test_an_interrupted_write_leaves_the_old_page_and_nothing_else(model, batch, tmp_path, monkeypatch):
    out = tmp_path / "page.html"
    out.write_text("old")

    def fail(*args):
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        report(model, [batch], out)
    assert out.read_text() == "old"
    assert list(tmp_path.iterdir()) == [out]


def test_without_plotly_the_extra_is_named(model, batch, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(ImportError, match=r'needs plotly; install it with: pip install "decouplify\[report\]"'):
        report(model, [batch], tmp_path / "page.html")
    assert not list(tmp_path.iterdir())
