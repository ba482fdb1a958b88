"""A real browser, which may reach this machine only."""

import shutil
from urllib.parse import urlsplit

import pytest

ARGUMENTS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    " --disable-component-update --disable-sync"
).split()


@pytest.fixture(scope="session")
def browser():
    """Chromium, as it is installed."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    found = shutil.which("chromium") or shutil.which("google-chrome")
    if not found:
        pytest.skip("needs Chromium")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=found, args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser):
    """Opens an address; in the end no page may have asked another machine, or had an error (which
    is in `open_page.wrong`, for who expects one)."""
    wrong, contexts = [], []

    def open_(address, *, width=1280, height=900, dark=False):
        scheme = "dark" if dark else "light"
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme,
            reduced_motion="reduce",
        )  # fmt: skip
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda said: said.type == "error" and wrong.append(said.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: _is_here(request.url) or wrong.append(request.url))
        page.goto(address)
        return page

    open_.wrong = wrong
    yield open_
    for context in contexts:
        context.close()
    assert not wrong


def _is_here(url: str) -> bool:
    parts = urlsplit(url)
    return parts.scheme in ("file", "data", "blob") or parts.hostname in ("127.0.0.1", "localhost")


@pytest.fixture
def assert_accessible():
    """axe-core finds nothing (contrast, names, roles, ...)."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-core")

    def check(page):
        found = axe.Axe().run(page).response["violations"]
        assert not found, [
            (each["id"], [node["html"][:200] for node in each["nodes"][:3]]) for each in found
        ]

    return check
