"""The report's page: it needs nothing else, and is readable wherever it is opened.

What a browser makes of it is tested with Chromium, and skipped only where there is none.
"""

from __future__ import annotations

import html
import importlib.resources
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import checkpoints
import commands
from commands import succeed
from mergekit_obim.report.page import short_names

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))),
    None,
)
browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium here")


@pytest.fixture(scope="session")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report on three experts of a model of 24 layers, one with a name that HTML must escape."""
    root = tmp_path_factory.mktemp("page")
    family = checkpoints.write_family(root, layers=24)
    odd = family.experts[2].rename(root / "<b>odd & long-name-of-an-expert-0123456789")
    models = [{"model": str(folder)} for folder in (*family.experts[:2], odd)]
    for model, density in zip(models, (0.4, 0.2, 0.1), strict=True):
        model["parameters"] = {"density": density}  # type: ignore[assignment]
    models[2]["parameters"]["criterion"] = [  # type: ignore[index]
        {"filter": "o_proj", "value": "random"}, {"value": "saliency"},
    ]  # fmt: skip
    models[2]["parameters"]["saliency"] = str(next(family.factored.glob("*expert2*")))  # type: ignore[index]
    recipe = {
        "merge_method": "obim",
        "base_model": str(family.base),
        "models": models,
        "parameters": {"saliency": str(family.factored)},
    }
    out = root / "report.html"
    succeed(commands.obim_report(commands.write_recipe(root, recipe), "-o", out, "--quiet"))
    return out


class Outline(HTMLParser):
    """What a page consists of."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "path", "use", "image", "rect"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            while self.open.pop() != tag:
                pass


def outline(page: Path) -> Outline:
    parsed = Outline()
    parsed.feed(page.read_text(encoding="utf-8"))
    return parsed


def test_it_needs_nothing_from_anywhere(page: Path) -> None:
    for tag, attributes in outline(page).tags:
        assert tag not in ("script", "link", "img", "iframe", "object", "embed"), tag
        for name in ("src", "href", "xlink:href", "data"):
            target = attributes.get(name)
            assert target is None or target.startswith(("#", "data:")), (tag, target)
    style = page.read_text(encoding="utf-8").partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style


def test_every_chart_has_its_text_and_its_numbers(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    figures = re.findall(r"<figure>(.*?)</figure>", text, re.DOTALL)
    assert len(figures) == 3 + 1 + 3 + 4 + 1
    for figure in figures:
        assert re.search(r"<div aria-hidden=\"true\"><svg", figure)
        assert len(re.search(r"<figcaption>(.*?)</figcaption>", figure, re.DOTALL)[1]) > 20  # type: ignore[index]
        assert re.search(r"<summary>Numbers</summary>.*<table>.*<td>", figure, re.DOTALL)
    assert outline(page).open == []
    ids = re.findall(r" id=\"([^\"]*)\"", text)
    assert len(set(ids)) == len(ids)
    for reference in re.findall(r"(?:url\(#|href=\"#)([\w-]+)", text):
        assert reference in ids
    levels = [int(tag[1]) for tag, _ in outline(page).tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert set(levels[1:]) == {2}


def test_no_word_in_a_chart_is_cut(page: Path) -> None:
    charts = "".join(re.findall(r"<svg.*?</svg>", page.read_text(encoding="utf-8"), re.DOTALL))
    assert "…" not in charts
    for words in ("overwritten by others", "dropped to the base", "post_attention_layernorm"):
        assert f">{words}</text>" in charts


def test_the_template_is_part_of_the_package() -> None:
    template = importlib.resources.files("mergekit_obim.report") / "page.html.jinja"
    assert "<!DOCTYPE html>" in template.read_text(encoding="utf-8")


def test_names_are_escaped(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "<b>odd" not in text
    assert html.escape("<b>odd & long-name") in text


@pytest.mark.slow
def test_the_page_is_the_same_each_time(page: Path) -> None:
    recipe = page.with_name("recipe.yml")
    again = page.with_name("again.html")
    succeed(commands.obim_report(recipe, "-o", again, "--quiet"))
    assert again.read_bytes() == page.read_bytes()


@pytest.mark.parametrize(
    ("references", "names"),
    [
        (["./models/math", "./models/code"], ["math", "code"]),
        (["a/expert", "b/expert"], ["a/expert", "b/expert"]),
        (["org/x+org/lora"], ["lora"]),
    ],
)
def test_short_names(references: list[str], names: list[str]) -> None:
    assert short_names(references) == names


# --- in a browser ----------------------------------------------------------------------------


def chromium(*options: str) -> str:
    assert BROWSER is not None
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    return done.stdout


WIDTHS = (320, 390, 1280)


@pytest.fixture(scope="module")
def layouts(page: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The page's layout in frames of so many pixels, folded and unfolded, by one browser."""
    script = """
      const doc = this.contentDocument;
      const boxes = [...doc.querySelectorAll("svg")].map(s => s.getBoundingClientRect());
      const letters = [...doc.querySelectorAll("svg text")].map(t => t.getBoundingClientRect());
      this.dataset.layout = JSON.stringify({
        wide: doc.documentElement.scrollWidth,
        right: Math.max(...boxes.map(b => b.right)), left: Math.min(...boxes.map(b => b.left)),
        letters: Math.min(...letters.map(b => Math.min(b.height, b.width > 0 ? b.height : 99))),
        outside: letters.filter(b => b.right > this.clientWidth + 1 || b.left < -1).length,
        focusable: [...doc.querySelectorAll("summary, [tabindex]")]
          .filter(e => e.tabIndex < 0).length,
        summaries: Math.min(...[...doc.querySelectorAll("summary")].map(e => e.offsetHeight)),
      });"""
    folded = page.read_text(encoding="utf-8")
    contents = {False: folded, True: folded.replace("<details>", "<details open>")}
    frames = tmp_path_factory.mktemp("layouts") / "frames.html"
    frames.write_text(
        "\n".join(
            f'<iframe id="{width}-{unfolded}" width="{width}" height="900" frameborder="0" '
            f'onload="{html.escape(script)}" srcdoc="{html.escape(content)}"></iframe>'
            for unfolded, content in contents.items()
            for width in WIDTHS
        ),
        encoding="utf-8",
    )
    found = chromium("--dump-dom", "--virtual-time-budget=5000", frames.as_uri())
    tags = re.findall(r"<iframe id=\"([^\"]+)\"[^>]*? data-layout=\"([^\"]*)\"", found)
    assert len(tags) == 2 * len(WIDTHS), found[:500]
    return {name: json.loads(html.unescape(layout)) for name, layout in tags}


@browser
@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("unfolded", [False, True])
def test_it_fits_any_width(layouts: dict[str, dict[str, Any]], width: int, unfolded: bool) -> None:
    layout = layouts[f"{width}-{unfolded}"]
    assert layout["wide"] <= width  # nothing scrolls sideways but tables, in their own frame
    assert layout["left"] >= 0
    assert layout["right"] <= width
    assert layout["outside"] == 0
    assert layout["letters"] >= 7  # pixels, of the smallest letters in a chart
    assert layout["focusable"] == 0  # everything that opens or scrolls can be reached by keys
    assert layout["summaries"] >= 40  # and hit by a finger


@browser
@pytest.mark.slow
def test_it_is_light_or_dark_as_the_reader_likes(page: Path, tmp_path: Path) -> None:
    from PIL import Image

    means = {}
    for name, scheme in (("dark", 0), ("light", 1)):
        shot = tmp_path / f"{name}.png"
        chromium(
            f"--blink-settings=preferredColorScheme={scheme}",
            "--window-size=500,2000",
            f"--screenshot={shot}",
            page.as_uri(),
        )
        pixels = np.asarray(Image.open(shot).convert("L"), dtype=float)
        means[name] = float(np.median(pixels))
        # The ink is the paper's opposite: there are letters, and they can be read.
        assert pixels.max() - pixels.min() > 200
    assert means["dark"] < 60
    assert means["light"] > 200
