"""A page is one file that needs no network, escapes what it is given, and opens in a browser without a complaint."""

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("plotly", reason="plotly is not installed (extra html)")
pytest.importorskip("jinja2", reason="jinja2 is not installed (extra html)")

from ullage.errors import InputError
from ullage.report.html.page import Fact, Section, Table, render, script_json, write_page

CHROMIUM = Path("/usr/bin/chromium")
EVIL = "</script><script>window.broken = 1</script><img src=x onerror='window.broken = 1'>"
FIGURE = {"data": [{"x": [1, 2], "y": [3, 4], "name": EVIL}], "layout": {"yaxis": {"title": {"text": "GiB"}}}}
ARGUMENTS = {
    "title": f"peak {EVIL}",
    "subtitle": EVIL,
    "status": "bad",
    "facts": [Fact("peak", "61.2 GiB", EVIL)],
    "notes": [EVIL],
    "sections": [
        Section("Timeline", EVIL, figure=FIGURE, alt=EVIL),
        Section("Holders", table=Table(("place", "bytes"), [(EVIL, "3.10 GiB"), ("b", "12 B")])),
        Section("Folded", folded=True, figure=FIGURE),
    ],
}


def browser_page(playwright, **settings):
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=[*arguments, "--disable-sync"])
    return browser, browser.new_page(**settings)


def open_page(path, after=lambda page: None, **settings):
    """Open a file; return the complaints, the addresses that were asked for, and what ``after`` returns."""
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (dependency group test)")
    if not CHROMIUM.exists():
        pytest.skip("chromium is not installed")
    complaints, asked = [], []
    with sync.sync_playwright() as playwright:
        browser, page = browser_page(playwright, **settings)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        page.wait_for_load_state("load")
        result = after(page)
        browser.close()
    return complaints, asked, result


def test_what_is_given_is_escaped():
    text = render(**ARGUMENTS)
    without_scripts = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    assert "<img" not in text
    assert EVIL not in text
    assert "&lt;img" in without_scripts


def test_a_page_without_figures_is_small():
    assert len(render(title="a", sections=[Section("b", "c")])) < 20_000


def test_nothing_is_fetched():
    text = render(**{**ARGUMENTS, "sections": ARGUMENTS["sections"][1:2]})
    assert not re.findall(r"(?:src|href)=[\"'](?!#|data:)", text)
    assert "default-src 'none'" in text


def test_json_in_a_script_cannot_end_it():
    text = script_json({"a": "</script>\u2028&"})
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == {"a": "</script>\u2028&"}


def test_amounts_stand_at_the_right():
    text = render(title="a", sections=[Section("b", table=Table(("place", "size"), [("x", "1.50 GiB"), ("y", "–")]))])
    assert '<td class="number">1.50 GiB</td>' in text
    assert "<td>x</td>" in text


def test_a_file_that_cannot_be_written_is_a_sentence(tmp_path):
    with pytest.raises(InputError, match="cannot be written"):
        write_page(tmp_path / "missing" / "a.html", title="a")
    assert list(tmp_path.iterdir()) == []


def test_a_browser_opens_it_without_a_complaint(tmp_path):
    path = tmp_path / "page.html"
    write_page(path, **ARGUMENTS)

    def look(page):
        page.click("summary")
        page.click("#theme")
        return page.evaluate(
            "[document.querySelectorAll('.plot .main-svg').length > 2, window.broken,"
            " document.documentElement.dataset.theme]"
        )

    complaints, asked, found = open_page(path, look)
    assert complaints == []
    assert asked == [path.as_uri()]
    assert found == [True, None, "dark"]


def test_a_script_that_fails_would_be_seen(tmp_path):
    path = tmp_path / "page.html"
    path.write_text("<title>a</title><script>nothing.like(this)</script>", encoding="utf-8")
    complaints, _asked, _found = open_page(path)
    assert complaints
