"""A page in Debian's Chromium, for the tests that look at one as a person does."""

import shutil
from contextlib import contextmanager

import pytest

BROWSER = shutil.which("chromium")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="there is no chromium (Debian: `apt install chromium`)")


@contextmanager
def open_browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


def open_tab(browser, url):
    """A tab, and the list of its errors, dialogs, and requests to elsewhere."""
    tab, wrong = browser.new_page(viewport={"width": 1440, "height": 900}, color_scheme="light"), []
    tab.set_default_timeout(180_000)  # what an idle machine does at once takes a busy one long
    tab.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on("dialog", lambda dialog: wrong.append(dialog.message))
    own = (url, "data:", "blob:")
    tab.on("request", lambda request: None if request.url.startswith(own) else wrong.append(request.url))
    return tab, wrong
