"""The report's pages in a browser: `make browser`, or python -m pytest tests/in_browser.py; no part of `make test`.

Needs Chromium (the first of `BROWSERS` on the path, or the file that JMAE_CHROMIUM names) and the extra `browser`.
"""

import os
import shutil

import pytest
from playwright.sync_api import sync_playwright
from test_comparison import a_run
from test_report import a_film, an_evaluation, calibrated, cases_of, unlabelled, write

from jmae.errors import exit_code
from jmae.report.__main__ import main

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1200, "height": 900}


@pytest.fixture(scope="module")
def browser():
    program = os.environ.get("JMAE_CHROMIUM") or next((p for name in BROWSERS if (p := shutil.which(name))), None)
    assert program, f"no browser: install one of {', '.join(BROWSERS)}, or set JMAE_CHROMIUM"
    with sync_playwright() as playwright:
        # A container's root cannot have Chromium's sandbox; the pages are our own.
        found = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"] * (os.geteuid() == 0))
        yield found
        found.close()


def converged():
    steps = [
        {"number": n, "auroc": 0.8 + 0.01 * i, "se": 0.01, "deviation": 0.02, "draws": 4}
        for i, n in enumerate((1, 2, 4))
    ]
    return {"what": "masks", "draws": 4, "steps": steps, "enough": None, "close": 0.01, "rising": True, "seconds": 3.0}


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A page of every kind, by name."""
    folder = tmp_path_factory.mktemp("pages")
    e = an_evaluation()
    e |= {"alarms": calibrated([], [], 99)["alarms"], "convergence": converged()}
    e["table"] = [row | {"p_value": 0.02} for row in e["table"]]
    write(folder / "images.html", e)
    write(folder / "volumes.html", e, cases_of(e, size=(60, 48, 30)))
    long = "a-case-whose-name-has-no-space-and-goes-on-" * 4
    evil = an_evaluation(uncalibrated="not calibrated: give it --config.data.calibration=0.1" + "x" * 90)
    evil["table"][0]["id"] = long
    write(folder / "long.html", evil, [c._replace(id=long) for c in cases_of(evil)], config={"k" * 80: "v" * 300})
    write(folder / "unlabelled.html", unlabelled(), history=[])
    films = [case._replace(film=a_film(), reconstruction=case.image) for case in cases_of(unlabelled(20))]
    write(folder / "films.html", unlabelled(20), films)
    runs = [a_run(folder / ("a-run-with-a-long-name-" * 2 + str(i)), 0.5 + i, memory=i) for i in range(4)]
    assert exit_code(main, [*map(str, runs), f"--out={folder / 'comparison.html'}", "--draws=50"]) == 0
    return {file.stem: file for file in folder.glob("*.html")}


NAMES = ("images", "volumes", "long", "unlabelled", "films", "comparison")


def opened(browser, file, size):
    """The page, and what it asked for or complained of."""
    page, found = browser.new_page(viewport=size), []
    page.on("console", lambda message: found.append(message.text))
    page.on("pageerror", lambda error: found.append(str(error)))
    page.on(
        "request", lambda r: found.append(r.url) if not r.url.startswith("data:") and r.url != file.as_uri() else None
    )
    page.goto(file.as_uri())
    return page, found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_a_page_asks_for_nothing_fits_its_window_and_shows_everything(browser, pages, name, size):
    page, found = opened(browser, pages[name], size)
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
    hidden = page.evaluate("""() => [...document.querySelectorAll('h1, h2, h3, p, figure, table, svg, img, figcaption')]
      .filter(e => !e.closest('.slices > div') || e.closest('.slices > input:checked + div'))
      .filter(e => { const b = e.getBoundingClientRect();
        return !b.width || !b.height || getComputedStyle(e).visibility != 'visible'; })
      .map(e => e.outerHTML.slice(0, 80))""")
    assert not hidden
    # Wider than the window is only what scrolls in a box of its own.
    out = page.evaluate("""() => [...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll, svg'))
      .filter(e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))""")
    assert not out
    broken = page.evaluate("[...document.images].filter(i => !i.complete || !i.naturalWidth).length")
    assert not broken and not found
    page.close()


def visible_slice(page, slider):
    return slider.locator("input:checked + div span", has_text="slice").inner_text()


@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_slices_are_paged_by_keys_and_by_touch(browser, pages, size):
    page, found = opened(browser, pages["volumes"], size)
    slider = page.locator(".slices").first
    shown = lambda: [i.evaluate("e => e.getBoundingClientRect().width > 0") for i in slider.locator("img").all()]
    assert sum(shown()) == 2  # a slice and its overlay
    first, picture = visible_slice(page, slider), slider.screenshot()
    for _ in range(400):  # by Tab alone from the top of the page
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.closest('.slices') !== null"):
            break
    assert page.evaluate(
        "document.activeElement.checked && document.activeElement.getAttribute('aria-label')"
    ).startswith(f"{first[0].upper()}{first[1:]}")
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    page.keyboard.press("ArrowRight")
    second = visible_slice(page, slider)
    assert second != first and sum(shown()) == 2 and slider.screenshot() != picture
    page.keyboard.press("ArrowLeft")
    assert visible_slice(page, slider) == first
    page.keyboard.press("Tab")  # a group is one stop
    assert page.evaluate("e => !e.contains(document.activeElement)", slider.element_handle())
    button = slider.locator("input:checked + div label", has_text="next")
    box = button.bounding_box()
    assert box["height"] >= 24 and box["width"] >= 24  # what a finger needs
    button.click()
    assert visible_slice(page, slider) == second
    slider.locator("input").first.click()
    assert visible_slice(page, slider).startswith("slice 1 of")
    other = page.locator(".slices").nth(1)
    assert sum(i.is_checked() for i in other.locator("input").all()) == 1
    assert not found
    page.close()


def test_what_opens_is_opened_by_keys(browser, pages):
    page, _ = opened(browser, pages["images"], DESKTOP)
    page.locator("summary", has_text="Cases by score").focus()
    page.keyboard.press("Enter")
    assert page.locator("details", has_text="Cases by score").locator("table").is_visible()
    page.close()


@pytest.mark.parametrize(("size", "first"), [(PHONE, 1), (DESKTOP, 6)], ids=["phone", "desktop"])
def test_a_click_makes_pictures_larger_and_they_keep_the_shape_of_the_film(browser, pages, size, first):
    page, found = opened(browser, pages["films"], size)
    bottoms = [picture.bounding_box() for picture in page.locator(".first img").all()]
    assert len(bottoms) == 6 and sum(box["y"] + box["height"] < size["height"] for box in bottoms) >= first
    figure = page.locator("#case-19")
    widths = lambda: [image.bounding_box()["width"] for image in figure.locator("img").all()]
    before = widths()
    figure.locator("img").first.click()
    assert page.url.endswith("#case-19") and min(widths()) > 2 * max(before)
    for image in figure.locator("img").all():
        box = image.bounding_box()
        assert abs(box["width"] / box["height"] - 410 / 512) < 0.01
    figure.locator("a", has_text="smaller").click()
    assert widths() == before and not found
    page.close()


def test_printed_pages_have_their_cases(browser, pages):
    page, _ = opened(browser, pages["volumes"], DESKTOP)
    page.emulate_media(media="print")
    assert page.locator(".slices").first.locator("input:checked + div img").first.is_visible()
    page.close()
