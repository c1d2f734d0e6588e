"""The page of an inspection: small, without a network, without a complaint of the browser, and it says the verdict."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
pytest.importorskip("plotly", reason="plotly is not installed (extra html)")
pytest.importorskip("jinja2", reason="jinja2 is not installed (extra html)")

from conftest import shared_path
from test_page import open_page
from training_snapshot import MIB, training

from ullage.cli import main
from ullage.report.html.page import MAX_PAGE_BYTES

OOM = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 "
    "GiB of which 1.00 GiB is free. Process 7 has 77.00 GiB memory in use. Of the allocated memory 70.00 GiB is "
    "allocated by PyTorch, and 5.00 GiB is reserved by PyTorch but unallocated.\n"
)


def page_of(source, tmp_path):
    path = tmp_path / "page.html"
    assert main(["inspect", str(source), "--html", str(path)]) == 0
    assert path.stat().st_size < MAX_PAGE_BYTES
    return path


def look(page):
    page.click("#theme")
    for summary in page.query_selector_all("summary"):
        summary.click()
    return page.evaluate(
        "({drawn: document.querySelectorAll('.plot .main-svg').length, title: document.querySelector('h1').innerText,"
        " headings: [...document.querySelectorAll('h2')].map(h => h.innerText),"
        " tables: document.querySelectorAll('table').length,"
        " wide: document.documentElement.scrollWidth > window.innerWidth})"
    )  # fmt: skip


def test_a_snapshot_as_a_page(tmp_path):
    path = page_of(training(8, leak=2 * MIB).save(tmp_path / "a.pickle"), tmp_path)
    complaints, asked, found = open_page(path, look)
    assert complaints == []
    assert asked == [path.as_uri()]
    assert "memory grows by 2.0 MiB per step" in found["title"]
    assert found["drawn"] >= 6  # three layers in each of at least two figures
    assert {"Over time", "Where the memory was", "What stays from step to step"} <= set(found["headings"])
    assert found["tables"] >= 4
    assert not found["wide"]


@pytest.mark.parametrize("size", [{"width": 390, "height": 800}, {"width": 1600, "height": 900}])
def test_a_page_fits_its_window(size, tmp_path):
    path = page_of(training(3).save(tmp_path / "a.pickle"), tmp_path)
    complaints, _asked, found = open_page(path, look, viewport=size)
    assert complaints == []
    assert not found["wide"]


def test_a_message_as_a_page(tmp_path):
    log = tmp_path / "train.log"
    log.write_text(OOM)
    complaints, _asked, found = open_page(page_of(log, tmp_path), look)
    assert complaints == []
    assert "What to change, cheapest first" in found["headings"]


@pytest.mark.parametrize("part", ["ctx128_fullstep", "oom_snapshot"])
def test_real_recordings_as_pages(part, tmp_path):
    names = list(shared_path("snapshots").glob(f"*{part}*"))
    if not names:
        pytest.skip("the shared snapshots are not beside this checkout")
    complaints, _asked, found = open_page(page_of(names[0], tmp_path), look)
    assert complaints == []
    assert found["title"].startswith(("✔ device 0", "✘ device 0"))


def test_the_page_of_a_long_recording_is_no_larger(tmp_path):
    runs = ((steps, training(steps).save(tmp_path / f"{steps}.pickle")) for steps in (4, 200))
    sizes = [page_of(path, tmp_path).stat().st_size for _steps, path in runs]
    assert sizes[1] - sizes[0] < 200_000


def test_without_the_extra_it_is_a_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    path = training(2).save(tmp_path / "a.pickle")
    assert main(["inspect", str(path), "--html", str(tmp_path / "page.html")]) == 2
    assert "pip install 'ullage[html]'" in capsys.readouterr().err
