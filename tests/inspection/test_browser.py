"""The page of `vae-ds explore` in a real browser without a screen: every control is used as a person would."""

import shutil
from collections.abc import Iterator

import pytest
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

from support import tiny
from vae_ds.inspection import server
from vae_ds.textvae import TextVAE

TEXTS = list(tiny.ENGLISH[:12])
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
# The screen of a small laptop.
WIDTH, HEIGHT = 1366, 768

pytestmark = [
    pytest.mark.skipif(
        CHROMIUM is None or DRIVER is None, reason="no chromium; Debian's packages are chromium and chromium-driver"
    ),
    pytest.mark.timeout(600),
]


class Page:
    """The page in a window, with the waits that its requests need."""

    def __init__(self, browser: webdriver.Chrome) -> None:
        self.browser = browser
        self._wait = WebDriverWait(browser, 60, poll_frequency=0.1)

    def __getitem__(self, name: str) -> WebElement:
        return self.browser.find_element(By.ID, name)

    def rows(self, name: str) -> list[str]:
        """The entries of a list, without the numbers before them."""
        items = self[name].find_elements(By.TAG_NAME, "li")
        return [item.get_property("lastChild")["textContent"] for item in items]

    def write(self, name: str, text: str) -> None:
        self[name].clear()
        self[name].send_keys(text)

    def click(self, name: str) -> None:
        """Click a button, and wait until every request of the page has its answer."""
        self[name].click()
        self.settle()

    def settle(self) -> None:
        self._wait.until(lambda _: self["busy"].text == "" and self.browser.execute_script("return waiting") == 0)

    def code(self) -> list[float]:
        found: list[float] = self.browser.execute_script("return z")
        return found


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    profile = tmp_path_factory.mktemp("profile")
    for word in ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"):
        options.add_argument(word)
    started = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield started
    started.quit()


@pytest.fixture
def page(browser: webdriver.Chrome, served: server.Server) -> Page:
    browser.set_window_size(WIDTH, HEIGHT)
    browser.get(served.url)
    opened = Page(browser)
    WebDriverWait(browser, 60).until(lambda _: opened.rows("neighbours"))
    opened.settle()
    return opened


def test_it_fits_the_screen(page: Page) -> None:
    """Nothing lies outside the window, and each part scrolls by itself."""
    script = "const e = document.documentElement; return [e.scrollWidth, e.clientWidth, e.scrollHeight, e.clientHeight]"
    width, shown_width, height, shown_height = page.browser.execute_script(script)
    assert width == shown_width
    assert height == shown_height
    for section in page.browser.find_elements(By.TAG_NAME, "section"):
        assert section.rect["y"] + section.rect["height"] <= shown_height
        assert page.browser.execute_script("return arguments[0].scrollWidth <= arguments[0].clientWidth", section)


def test_a_sentence_a_unit_and_back(page: Page, vae: TextVAE) -> None:
    sentence = TEXTS[5]
    page.write("text", sentence)
    page.click("encode")
    z_NL = vae.encode([sentence])
    assert page.code() == pytest.approx(z_NL[0].tolist(), abs=1e-4)
    assert page["decoded"].text == vae.decode(z_NL)[0]
    assert page["logprob"].text.startswith("log p: -")
    assert page.rows("neighbours")[0] == sentence

    slider = page["units"].find_elements(By.CSS_SELECTOR, "input")[2]
    before = page.code()
    slider.send_keys(Keys.END)
    page.settle()
    after = page.code()
    assert after[2] == 4
    assert [*after[:2], *after[3:]] == [*before[:2], *before[3:]]
    assert page["decoded"].text == vae.decode([after])[0]
    page.click("reset")
    assert page.code() == before


def test_interpolate_mix_and_sample(page: Page, vae: TextVAE) -> None:
    one, other = TEXTS[3], TEXTS[8]
    page.write("a", one)
    page.write("b", other)
    page.write("steps", "5")
    page.click("interpolate")
    assert page.rows("between") == vae.interpolate(one, other, 5)
    page["between"].find_elements(By.TAG_NAME, "li")[2].click()
    page.settle()
    assert page["text"].get_property("value") == page.rows("between")[2]

    page.write("mix1", one)
    page.write("mix2", other)
    page.click("mix")
    assert page.code() == pytest.approx(vae.encode([one, other]).mean(0).tolist(), abs=1e-4)

    page.write("n", "6")
    page.write("seed", "7")
    page.click("sample")
    assert page.rows("samples") == vae.sample(6, seed=7)


def test_a_text_on_the_map(page: Page) -> None:
    """A point shows its text under the pointer, and a click takes it."""
    x, y = page.browser.execute_script("return pixel(model.places[4])")
    canvas = page["map"]
    at = ActionChains(page.browser).move_to_element_with_offset(
        canvas, round(x - canvas.rect["width"] / 2), round(y - canvas.rect["height"] / 2)
    )
    at.perform()
    text, _, label = page["hover"].text.rpartition(" [")
    assert label == ("even]", "odd]")[TEXTS.index(text) % 2]
    at.click().perform()
    page.settle()
    assert page["text"].get_property("value") == text


def test_an_error_is_told_and_gone_after_the_next_action(page: Page) -> None:
    page.write("text", " ")
    page.click("encode")
    assert page["error"].text
    page.write("text", TEXTS[0])
    page.click("encode")
    assert page["error"].text == ""


def test_a_narrow_window_has_one_column(page: Page) -> None:
    page.browser.set_window_size(600, 900)
    lefts = {section.rect["x"] for section in page.browser.find_elements(By.TAG_NAME, "section")}
    assert len(lefts) == 1
