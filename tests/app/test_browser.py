"""The page in a browser, on a phone and on a desk: nothing is cut off, and a drawing is answered."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.app import finished_image_run

CHROMIUM = Path("/usr/bin/chromium")
WIDER = "[document.scrollingElement.scrollWidth, window.innerWidth]"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where the page of a finished run is."""
    pytest.importorskip("gradio")
    from unsc_hf.app import build, open_run, serve

    page = build(open_run(finished_image_run(tmp_path_factory.mktemp("browser"))))
    yield serve(page, wait=False)
    page.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM.is_file():
        pytest.skip("chromium is not installed")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_and_answers(width: int, address: str, browser: Any) -> None:
    page = browser.new_page(viewport={"width": width, "height": 844})
    page.set_default_timeout(120_000)
    page.goto(address, wait_until="domcontentloaded")
    page.locator("button[aria-label=Brush]").wait_for()
    page.wait_for_timeout(2000)  # until the brush is chosen
    box = page.locator("canvas").first.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y - 50)
    page.mouse.down()
    page.mouse.move(x + 30, y + 50, steps=8)
    page.mouse.up()
    page.get_by_text("A model that never saw").wait_for()
    for tab in ("Try it", "Report", "Attack it"):
        page.get_by_role("tab", name=tab).click()
        if tab == "Attack it":
            page.get_by_role("button", name="Relearn").click()
            page.get_by_text("; retrained").wait_for()
        page.wait_for_timeout(500)
        content, window = page.evaluate(WIDER)
        assert content <= window == width, tab
    frame = page.frame_locator("iframe.report")
    assert "forget" in frame.locator("body").inner_text().lower()
    page.close()
