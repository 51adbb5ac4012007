"""The page of a report, in a real browser: nothing goes wrong in it, and its table sorts and filters."""

import shutil

import pandas
import pytest

from bench.measure import COLUMNS
from bench.report import frame_of, write

pytestmark = pytest.mark.not_interpreted
LOSSES = {"mse_loss": 2.0, "cross_entropy": 10.0, "kl_div": 0.5, "<b>bold</b>": 100.0}  # eager's ms; ours take 1


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    rows = [
        dict.fromkeys(COLUMNS, "")
        | {"loss": loss, "shape": "8×16", "dtype": "float32", "provider": provider, "pass": "full", "ms": ms}
        | {"moved_mb": 1.0, "floor_ms": 0.5, "gb_per_s": 1 / ms, "share": 0.5 / ms, "peak_mb": 1.0, "error": 1e-7}
        for loss, eager in LOSSES.items()
        for provider, ms in (("triton_losses", 1.0), ("eager", eager))
    ]
    numbers = ["ms", "moved_mb", "floor_ms", "gb_per_s", "share", "peak_mb", "error"]
    frame = frame_of(rows, COLUMNS).replace("", pandas.NA).fillna({"options": "", "failed": ""})
    where = tmp_path_factory.mktemp("report")
    write(frame.astype(dict.fromkeys(numbers, float)), ["Where it ran", "With what"], where)
    return where / "report.html"


@pytest.fixture
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in programs:
        pytest.skip("Chromium and its driver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for argument in ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options, webdriver.ChromeService(programs[1]))
    yield started
    started.quit()


def test_the_page_needs_no_other_file_and_shows_names_as_they_are(page):
    text = page.read_text()
    assert "http://" not in text and "https://" not in text and text.count("data:image/png;base64,") == 2
    assert "<b>bold" not in text and "Where it ran" in text


def column(browser, at):
    return [row.find_elements("tag name", "td")[at].text for row in browser.find_elements("css selector", "tbody tr")]


def test_the_table_sorts_and_filters_and_the_console_is_silent(page, browser):
    browser.get(page.as_uri())
    headings = [heading.text for heading in browser.find_elements("tag name", "th")]
    speed_up = headings.index("speed-up")
    assert column(browser, 0) == list(LOSSES)
    sort = browser.find_elements("css selector", "th button")[speed_up]
    sort.click()
    assert column(browser, speed_up) == ["0.50×", "2.00×", "10.00×", "100.00×"]
    sort.click()
    assert column(browser, 0) == ["<b>bold</b>", "cross_entropy", "mse_loss", "kl_div"]
    browser.find_element("id", "filter").send_keys("ENTROPY 8×16")
    assert [row.is_displayed() for row in browser.find_elements("css selector", "tbody tr")] == [
        False,
        True,
        False,
        False,
    ]
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_is_no_wider_than_its_window(width, page, browser):
    browser.set_window_size(width, 900)
    browser.get(page.as_uri())
    inner, content = browser.execute_script("return [innerWidth, document.documentElement.scrollWidth]")
    assert content <= inner
    assert all(picture.size["width"] <= inner for picture in browser.find_elements("tag name", "img"))
