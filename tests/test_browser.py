"""The team's pages in a real browser, Debian's Chromium: what is seen, and that nothing runs."""

import itertools
import shutil
from datetime import UTC, datetime, timedelta

import pytest
from conftest import build

import app as kyc

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium cannot be imported")
from selenium.webdriver.chrome.options import Options  # noqa: E402
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.expected_conditions import staleness_of  # noqa: E402
from selenium.webdriver.support.ui import Select, WebDriverWait  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="there is no chromium: apt install chromium chromium-driver"
)

TOKEN = "token_0123456789abcdefgh"
FLAGS = [
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
]
HOSTILE = [
    *("<script>document.title = 'harmed'</script>", '"><img src=x onerror=document.title=1>'),
    *("'); alert(1); ('", "a/b/../c", "..", "50%25 off?a=b#c", "line\nend", "\u202etxt.exe"),
    *("x" * 1000, "مستخدم", "{{ 7 * 7 }}", "javascript:alert(1)", "x/events"),
]
CONTRAST = """  // of each text with what is painted behind it: those below 4.5, which WCAG asks for
    const gamma = (part) => part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
    const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
    const lightness = (colour) => [0.2126, 0.7152, 0.0722].reduce(
        (sum, weight, index) => sum + weight * gamma(colour[index] / 255), 0);
    const ground = (one) => {
        const colour = parts(getComputedStyle(one).backgroundColor);
        return colour.length < 4 || colour[3] ? colour : ground(one.parentElement);
    };
    const written = (node) => node.nodeType == 3 && node.data.trim();
    return [...document.querySelectorAll("body *")].filter((one) =>
        one.offsetParent && [...one.childNodes].some(written)
    ).filter((one) => {
        const pair = [parts(getComputedStyle(one).color), ground(one)].map(lightness);
        return (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05) < 4.5;
    }).map((one) => one.outerHTML.slice(0, 120));
"""


class Page:
    """A browser that has the token, and a server with some people."""

    def __init__(self, browser, server):
        self.browser, self.server = browser, server

    def open(self, path, width=1200, scheme="light"):
        """Go to a path, in a window of this width and in this colour scheme."""
        run = self.browser.execute_cdp_cmd
        feature = {"name": "prefers-color-scheme", "value": scheme}
        run("Emulation.setEmulatedMedia", {"features": [feature]})
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        run("Emulation.setDeviceMetricsOverride", size)
        self.browser.get(f"http://any:{TOKEN}@127.0.0.1:{self.server.port}{path}")

    def find(self, selector):
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def texts(self, selector):
        return [one.text for one in self.browser.find_elements(By.CSS_SELECTOR, selector)]

    def press(self, *keys):
        self.browser.switch_to.active_element.send_keys(*keys)

    def follow(self, act, *arguments):
        """Do what leads to another page; return when that has been loaded."""
        before = self.find("html")
        act(*arguments)
        wait = WebDriverWait(self.browser, 20)
        wait.until(staleness_of(before))
        wait.until(
            lambda browser: browser.execute_script("return document.readyState") == "complete"
        )

    def path(self):
        return self.browser.execute_script("return location.pathname + location.search")

    def complaints(self):
        """Return what the browser's console says, such as what the policy has blocked."""
        return [one["message"] for one in self.browser.get_log("browser")]


@pytest.fixture
def environ(environ):
    return {**environ, "KYC_API_TOKEN": TOKEN, "KYC_TEMPLATES": "itmpl_1"}


@pytest.fixture
def page(serve, tmp_path):
    server = serve()
    options = Options()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS, f"--user-data-dir={tmp_path / 'profile'}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(DRIVER))
    browser.set_page_load_timeout(30)
    yield Page(browser, server)
    browser.quit()


@pytest.fixture
def people(page):
    """Some people: held, in review, stuck, approved; and those with hostile IDs."""

    def add(name, hours, **ids):
        at = kyc.format_time(datetime.now(UTC) - timedelta(hours=hours))
        body = build(name, created_at=at, template_id=ids.pop("template_id", "itmpl_1"), **ids)
        assert page.server.send(body)[0] == 200

    add("inquiry.approved", 50, reference_id="held", inquiry_id="inq_held", account_id="act_held")
    add("report/watchlist.matched", 40, inquiry_id="inq_held", object_id="rep_1")
    add("inquiry.declined", 30, reference_id="held", template_id="itmpl_2")
    add("inquiry.marked-for-review", 20, reference_id="review", inquiry_id="inq_review")
    add("inquiry.completed", 10, reference_id="stuck", inquiry_id="inq_stuck")
    add("inquiry.approved", 5, reference_id="fine", inquiry_id="inq_fine", account_id="act_fine")
    for number, reference in enumerate(HOSTILE):
        add("inquiry.declined", 1, reference_id=reference, inquiry_id=f"inq_h{number}")
    add("inquiry.declined", 1, reference_id="odd", inquiry_id="inq_<img src=x onerror=alert(1)>")


PLACES = ["/people", "/people/held", "/people?status=declined", "/events", "/people?id=nobody"]
LOOKS = list(itertools.product((380, 1200), ("light", "dark")))


@pytest.mark.usefixtures("people")
def test_every_page_fits_and_can_be_read_narrow_and_wide_light_and_dark(page):
    grounds = set()
    for place, (width, scheme) in itertools.product(PLACES, LOOKS):
        page.open(place, width, scheme)
        run = page.browser.execute_script
        assert run("return document.documentElement.scrollWidth") <= width, (place, width)
        assert run(CONTRAST) == [], (place, scheme)
        grounds.add((scheme, run("return getComputedStyle(document.body).backgroundColor")))
        assert run("return document.scripts.length") == 0
        fields = page.browser.find_elements(By.CSS_SELECTOR, "input, select")
        assert all(run("return arguments[0].labels.length", field) for field in fields)
    assert len(grounds) == 2  # one for each scheme: the stylesheet was let in
    noise = [one for one in page.complaints() if "404 (NOT FOUND)" not in one]
    assert noise == []  # the policy has blocked nothing


@pytest.mark.usefixtures("people")
def test_support_finds_a_person_by_the_keyboard_alone(page):
    page.open("/people")
    page.follow(page.press, "act_held", Keys.ENTER)  # the search box has the focus
    assert page.path() == "/people/held"
    assert page.texts("h1") == ["held"]
    notices = page.texts(".notice")
    assert notices[0].startswith("Held: do not act on the approval")
    assert "match of a report (watchlist): rep_1" in notices[0]
    assert notices[1].startswith("Approved")
    assert page.texts("table:last-of-type tbody tr td:nth-child(3)") == [
        "decides",
        "no: its template is not in KYC_TEMPLATES",
    ]
    page.press(Keys.TAB)
    skip = page.browser.switch_to.active_element
    assert (skip.text, skip.is_displayed()) == ("Skip to the content", True)
    assert skip.rect["y"] >= 0
    page.press(Keys.ENTER)
    page.press(Keys.TAB)
    first = page.browser.switch_to.active_element
    assert first.get_attribute("href").endswith("/dashboard/inquiries/inq_held")
    outline = "return getComputedStyle(document.activeElement).outlineStyle"
    assert page.browser.execute_script(outline) == "solid"


@pytest.mark.usefixtures("people")
def test_who_needs_attention_comes_first(page):
    page.open("/people", 380)
    assert page.texts("table:first-of-type tbody td:first-child") == ["held", "review", "stuck"]
    assert page.texts("table:first-of-type tbody td:nth-child(3)") == [
        "match of a report (watchlist): rep_1",
        "waits for a decision",
        "no decision for over an hour",
    ]
    assert "1\nheld" in page.texts(".cards li")


@pytest.mark.usefixtures("people")
def test_filters_are_a_form(page):
    page.open("/people")
    Select(page.find("select[name=status]")).select_by_value("approved")
    Select(page.find("select[name=held]")).select_by_value("false")
    page.follow(page.find(".filters button").click)
    assert page.texts("tbody td:first-child") == ["fine"]
    page.follow(page.find("tbody a").click)
    assert page.texts(".notice") == page.texts(".notice.approved")
    assert page.texts(".notice strong") == ["Approved, and nothing stands against it"]


@pytest.mark.usefixtures("people")
def test_hostile_ids_are_text_and_their_links_lead_to_them(page):
    page.open("/people?status=declined")
    links = {
        one.get_attribute("href") for one in page.browser.find_elements(By.CSS_SELECTOR, "td a")
    }
    assert len(links) == len(HOSTILE) + 1
    titles = set()
    for link in links:
        page.browser.get(link)
        titles.add(page.find("h1").text)
        assert page.browser.title == page.find("h1").text + " · KYC"
        assert page.browser.find_elements(By.CSS_SELECTOR, "img, script, iframe, b b") == []
        assert page.texts(".notice strong") == ["Declined"]
    shown = {"line\nend": r"line\u000aend", "\u202etxt.exe": r"\u202etxt.exe"}
    assert titles == {shown.get(one, one) for one in HOSTILE} | {"odd"}
    assert page.complaints() == []


@pytest.mark.usefixtures("people")
def test_search_in_vain_keeps_what_was_typed(page):
    page.open("/people")
    page.follow(page.press, "<b>nobody</b>", Keys.ENTER)
    assert page.texts("h1") == ["No event names <b>nobody</b>"]
    assert page.find("input[type=search]").get_attribute("value") == "<b>nobody</b>"


def test_browser_is_asked_for_the_token(page):
    page.browser.get(f"{page.server.url}/people")
    assert "KYC" not in page.browser.title
    page.open("/people")
    assert page.browser.title == "People · KYC"
    page.follow(page.find("nav a:last-child").click)
    assert page.texts("h1") == ["Events"]
