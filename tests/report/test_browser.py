"""The report as a person sees it: in a real Chromium, in light and in dark."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fptq_export.progress import NoProgress
from fptq_export.report.run import run_report
from tests.report.synthetic_run import BLOCKS, HOSTILE, SECTIONS, write_run

BROWSER = Path(__file__).with_name("chromium.py")
PLOTS = {
    "plot-debug-alone",
    "plot-debug-accumulated",
    "plot-ranges",
    "plot-levels",
    "plot-sizes",
    "plot-times",
    "plot-pareto",
}
PNG = b"\x89PNG\r\n\x1a\n"
Look = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`report.html` of a run whose names come from an enemy."""
    directory = tmp_path_factory.mktemp("browser")
    run = write_run(
        directory / "run", model=f"models/{HOSTILE}", command=f"fptq-export {HOSTILE}", hostile_name=HOSTILE
    )
    (files,) = run_report(run, None, None, NoProgress())
    return files.html


@pytest.fixture(scope="module")
def looks(page: Path) -> Look:
    """What Chromium found, by colour scheme."""
    if importlib.util.find_spec("PySide6") is None:
        pytest.skip("no Chromium: pip install PySide6-WebEngine")
    return {scheme: _look(page, scheme) for scheme in ("light", "dark")}


def _look(page: Path, scheme: str) -> dict[str, Any]:
    command = [sys.executable, str(BROWSER), str(page), str(page.parent), scheme]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert "sections" in found, done.stderr
    return found


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_says_nothing_on_the_console_and_asks_for_nothing(looks: Look, page: Path, scheme: str) -> None:
    """No error, no injected script, and no request but the page itself."""
    assert looks[scheme]["console"] == []
    assert looks[scheme]["requests"] == [page.resolve().as_uri()]


def test_every_section_and_plot_is_there(looks: Look) -> None:
    """All sections have words, all pictures are drawn, and every link of the contents leads somewhere."""
    found = looks["light"]
    assert tuple(section["id"] for section in found["sections"]) == SECTIONS
    assert all(section["visible"] and section["words"] for section in found["sections"])
    assert {plot["id"] for plot in found["plots"] if plot["visible"]} == PLOTS
    assert set(found["drawn"]) == PLOTS
    assert found["dangling"] == []
    assert found["repeated"] == []


@pytest.mark.parametrize("plot", sorted(PLOTS))
def test_labels_of_a_plot_can_be_read(looks: Look, plot: str) -> None:
    """No two labels touch, and none is cut off at the edge."""
    (found,) = [entry for entry in looks["light"]["plots"] if entry["id"] == plot]
    assert found["touching"] == []
    assert found["outside"] == []


def test_every_block_has_its_number_below_the_ranges(looks: Look) -> None:
    """All 30 blocks are labelled below each of the three kinds of input, and both thresholds are named."""
    (found,) = [entry for entry in looks["light"]["plots"] if entry["id"] == "plot-ranges"]
    missing = [block for block in range(BLOCKS) if found["texts"].count(str(block)) < 3]
    assert missing == []
    assert {"v0 = 15", "v1 = 150"} <= set(found["texts"])


def test_axes_name_their_units(looks: Look) -> None:
    """Each picture says what its axes count, and in what."""
    labels = {entry["id"]: " ".join(entry["texts"]) for entry in looks["light"]["plots"]}
    for plot, words in {
        "plot-ranges": ("max |x|, no unit", "block"),
        "plot-levels": ("INT8 steps of 127", "block"),
        "plot-debug-alone": ("SQNR, dB", "block"),
        "plot-debug-accumulated": ("SQNR, dB", "block"),
        "plot-sizes": ("size, MiB",),
        "plot-times": ("time, µs for one token, modelled",),
        "plot-pareto": ("bits a weight", "one token, µs", "nats a token"),
    }.items():
        assert [word for word in words if word not in labels[plot]] == [], plot


def test_click_on_a_heading_sorts_by_value(looks: Look) -> None:
    """Numbers sort as numbers, up and then down; dashes stand last both times."""
    column = next(found for found in looks["light"]["tables"]["table-policy"] if found["title"] == "max |x|")
    numbers = [float(text) for text in column["before"] if text != "–"]
    assert column["up"] == [*(f"{value:.4g}" for value in sorted(numbers)), "–"]
    assert column["down"] == [*(f"{value:.4g}" for value in sorted(numbers, reverse=True)), "–"]
    assert (column["ascending"], column["descending"]) == ("ascending", "descending")


def test_every_column_of_every_table_sorts(looks: Look) -> None:
    """A click changes the order only: no row is lost, and the second click turns columns of words around."""
    for name, columns in looks["light"]["tables"].items():
        for column in columns:
            assert sorted(column["up"]) == sorted(column["before"]), name
            if not column["numeric"] and len(set(column["up"])) == len(column["up"]):
                assert column["down"] == column["up"][::-1], name


def test_dark_page_is_dark_with_light_plots(looks: Look) -> None:
    """Paper and ink change places with the reader's colour scheme, the text inside of pictures included."""
    brightness = {
        scheme: (_brightness(found["paper"]), *(_brightness(plot["ink"]) for plot in found["plots"]))
        for scheme, found in looks.items()
    }
    paper, *inks = brightness["light"]
    assert paper > 200
    assert max(inks) < 80
    paper, *inks = brightness["dark"]
    assert paper < 60
    assert min(inks) > 200


def test_screenshots_of_both_schemes(looks: Look, page: Path) -> None:
    """A picture of the whole page in each scheme, and they differ."""
    light, dark = ((page.parent / f"{scheme}.png").read_bytes() for scheme in looks)
    assert light.startswith(PNG)
    assert dark.startswith(PNG)
    assert light != dark


def test_page_is_no_wider_than_the_window(looks: Look) -> None:
    """Wide tables scroll by themselves; the page does not."""
    assert looks["light"]["wide"] <= 0


def _brightness(colour: str) -> float:
    """Mean of the three parts of `rgb(1, 2, 3)`."""
    parts = [float(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    return sum(parts) / len(parts)
