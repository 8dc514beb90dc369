"""The pages in headless Chromium, driven by Selenium."""

import base64
import json
import shutil
import time

import numpy as np
import pypdfium2
import pytest
from runs import make_audit, make_run

from tuning.report import Flags
from tuning.report import run as run_report
from tuning.show import report

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromium-driver (apt-get install them)"),
]
EVIL = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium (the extra `dev`)")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1400,1000"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_script_timeout(600)
    yield driver
    driver.quit()


@pytest.fixture
def opened(browser, tmp_path):
    """A function that opens a page; in the end it has asked for nothing and complained of nothing."""
    pages = []

    def open_page(path):
        pages.append(path.as_uri())
        browser.get(pages[-1])  # it comes back sooner
        wait(browser, f"document.readyState === 'complete' && location.href === {json.dumps(pages[-1])}")
        return browser

    browser.get_log("browser"), browser.get_log("performance")
    yield open_page
    assert browser.get_log("browser") == []
    sent = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = {message["params"]["request"]["url"] for message in sent if message["method"] == "Network.requestWillBeSent"}
    assert {url for url in urls if not url.startswith("data:")} == set(pages)


def wait(browser, script, seconds=600):
    """What the script returns, once that is true."""
    until = time.monotonic() + seconds
    while not (found := browser.execute_script(f"return {script}")):
        assert time.monotonic() < until, script
        time.sleep(0.05)
    return found


def find(browser, selector):
    return browser.find_elements("css selector", selector)


def draw_all(browser):
    wait(browser, "typeof draw === 'function'")  # on a busy machine the page was seen before its script had run
    browser.execute_script("document.querySelectorAll('[data-figure]').forEach((one) => draw(one, makers.get(one)))")
    wait(browser, "[...document.querySelectorAll('[data-figure]')].every((one) => one.hidden || one.dataset.drawn)")


def rows(browser):
    cells = "[...document.querySelectorAll('tr.trial')].map((row) => [...row.cells].map((cell) => cell.textContent))"
    return browser.execute_script(f"return {cells}")


def column(browser, key):
    heads = [head.get_attribute("data-key") for head in find(browser, ".trials th")]
    return [row[heads.index(key)] for row in rows(browser)]


def test_every_figure_is_drawn_light_and_dark_wide_and_narrow(opened, tmp_path):
    browser = opened(report.write(make_run(tmp_path / "run")))
    draw_all(browser)
    shown = [one.get_attribute("data-figure") for one in find(browser, "[data-drawn]")]
    assert shown == [
        *("time", "curves", "importance", "rates", "depths", "gap", "ends"),
        *("seconds", "latency", "size", "parameters", "finalists"),
    ]
    for width, shade in ((390, "light"), (390, "dark"), (1400, "dark")):
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        media = {"features": [{"name": "prefers-color-scheme", "value": shade}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
        ink = "getComputedStyle(document.body).color"
        assert (browser.execute_script(f"return {ink}") == "rgb(230, 232, 234)") == (shade == "dark")
        font = "document.querySelector('[data-figure=time] .xtick text').style.fill"
        wait(browser, f"{font} === '{'rgb(154, 162, 171)' if shade == 'dark' else 'rgb(92, 99, 107)'}'")
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


AXES = {  # words below a figure, and its height in points
    "search time (": 270,
    "stages unfrozen, from the head": 130,
    "loss on training images, without augmentation": 270,
    "training time (s)": 270,
    "latency for one image (ms)": 270,
    "trained parameters": 270,
    "parameters of the model": 270,
    "better than the default by (": 100,
}


def test_it_prints(opened, tmp_path):
    """On paper, of a page that nobody has scrolled, each figure is there, with a place of its own."""
    browser = opened(report.write(make_run(tmp_path / "run", reason=" of 8 planned")))
    wait(browser, "document.querySelectorAll('[data-drawn]').length === 12", 120)
    printed = browser.execute_cdp_cmd("Page.printToPDF", {"printBackground": True, "preferCSSPageSize": True})["data"]
    pages = pypdfium2.PdfDocument(base64.b64decode(printed))
    places = {}
    for number, page in enumerate(pages):
        text = page.get_textpage()
        for words in AXES:
            if found := text.search(words).get_next():
                assert words not in places
                left, bottom, *_ = text.get_charbox(found[0])
                places[words] = (number, left, bottom)
    assert places.keys() == AXES.keys()
    for words, (number, _, bottom) in places.items():
        picture = pages[number].render(scale=1).to_numpy().astype(int)
        end = len(picture) - round(bottom)
        inside = picture[end - AXES[words] : end, :540]
        assert (np.ptp(inside, axis=2) > 60).sum() > 40, f"nothing is drawn above {words}"
        others = [place[2] for name, place in places.items() if name != words and place[0] == number]
        assert all(abs(other - bottom) > 130 for other in others), f"{words} lies over another figure"
    text = "".join(page.get_textpage().get_text_range() for page in pages)
    assert "epochs of 8 planned" in text  # on one line


def test_the_table_sorts_and_filters(opened, tmp_path):
    browser = opened(report.write(make_run(tmp_path / "run", trials=60)))
    assert "of 75" in find(browser, ".count")[0].text and len(rows(browser)) == 50
    values = [float(value) for value in column(browser, "val_tempered_loss")]
    assert values == sorted(values)  # the best first
    head = find(browser, "th[data-key=config_learning_rate] button")[0]
    head.click()
    rates = [float(value) for value in column(browser, "config_learning_rate")]
    assert rates == sorted(rates)
    head.click()
    rates = [float(value) for value in column(browser, "config_learning_rate")]
    assert rates == sorted(rates, reverse=True)
    assert find(browser, "th[aria-sort]")[0].get_attribute("aria-sort") == "descending"

    find(browser, ".pages button")[1].click()
    assert len(rows(browser)) == 25
    find(browser, "input[type=search]")[0].send_keys("VGG16 stopped")
    assert set(column(browser, "config_backbone")) == {"vgg16"} and set(column(browser, "status")) == {"stopped"}
    find(browser, "input[type=search]")[0].clear()
    find(browser, "input[type=search]")[0].send_keys("nothing like it")
    assert rows(browser) == [] and find(browser, ".count")[0].text == "0 trials"
    clear = "arguments[0].value = ''; arguments[0].dispatchEvent(new Event('input'))"
    browser.execute_script(clear, find(browser, "[type=search]")[0])
    find(browser, "select option[value=diverged]")[0].click()
    assert set(column(browser, "status")) == {"diverged"}


def test_a_row_opens_its_full_history(opened, tmp_path):
    browser = opened(report.write(make_run(tmp_path / "run", epochs=8)))
    index = column(browser, "status").index("completed")
    name = column(browser, "trial_id")[index]
    find(browser, "tr.trial .id")[index].click()
    wait(browser, "document.querySelector('tr.history .figure')?.dataset.drawn")
    tables = find(browser, "tr.history table")
    assert len(tables[0].find_elements("css selector", ":scope > tbody > tr")) == 8
    assert len(tables[1].find_elements("css selector", ":scope > tbody > tr")) == 3  # decisions after 1, 2 and 4 epochs
    assert "completed after 8 epochs" in find(browser, "tr.history")[0].text
    assert find(browser, "tr.history")[0].get_attribute("data-of") == name
    find(browser, "tr.trial .id")[index].click()
    assert find(browser, "tr.history") == []
    find(browser, "tr.trial .id")[column(browser, "status").index("failed")].click()
    assert "RuntimeError: <b>the film is torn</b>" in wait(browser, "document.querySelector('pre.error')?.textContent")


def test_hovering_tells_the_trial(opened, tmp_path):
    from selenium.webdriver import ActionChains

    browser = opened(report.write(make_run(tmp_path / "run")))
    wait(browser, "document.querySelector('[data-figure=time]').dataset.drawn")
    point = find(browser, "[data-figure=time] .points path")[0]
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", point)
    ActionChains(browser).move_to_element(point).perform()
    told = wait(browser, "document.querySelector('[data-figure=time] .hoverlayer')?.textContent")
    assert "t000" in told and "val_tempered_loss" in told and "learning rate" in told


def test_what_looks_like_markup_is_text_everywhere(opened, tmp_path):
    names = (EVIL, "quote\"'&amp;", "lung 🫁\nnew line")
    folder = make_run(tmp_path / "run", classes=names, reason="</script><b>why</b>", backbones=(EVIL, "vgg16"))
    make_audit(folder, paths=("a</script>\n🫁'\".png", "<img src=x onerror=alert(2)>.png"))
    browser = opened(report.write(folder))
    draw_all(browser)
    find(browser, "tr.trial .id")[0].click()
    wait(browser, "document.querySelector('tr.history .figure')?.dataset.drawn")
    browser.execute_script("document.querySelectorAll('details').forEach((one) => (one.open = true))")
    shown = find(browser, "main")[0].text
    for words in (
        EVIL,
        "quote\"'&amp;",
        "lung 🫁\\nnew line",
        "a</script>\\n🫁'\".png",
        "<img src=x onerror=alert(2)>.png",
    ):
        assert words in shown
    assert "</script><b>why</b>" in find(browser, "tr.history")[0].text
    assert EVIL in find(browser, "[data-figure=rates] .legend")[0].text
    assert find(browser, "main script, main b, main img[src=x]") == []
    assert browser.execute_script("return document.scripts.length") == 5  # data, two packed ones, ours, Plotly's


def test_two_thousand_trials_stay_usable(opened, tmp_path):
    path = report.write(make_run(tmp_path / "run", trials=2000, epochs=50, early=0.0))
    assert path.stat().st_size < 6_000_000
    browser = opened(path)
    draw_all(browser)
    assert len(rows(browser)) == 50 and "of 2,015" in find(browser, ".count")[0].text
    assert browser.execute_script("return document.querySelectorAll('*').length") < 25_000
    find(browser, "tr.trial .id")[0].click()
    wait(browser, "document.querySelector('tr.history .figure')?.dataset.drawn")


def test_a_killed_run_and_one_without_trials(opened, tmp_path):
    browser = opened(report.write(make_run(tmp_path / "killed", killed=True)))
    draw_all(browser)
    assert "not finished: 22 of 24 trials" in find(browser, "header")[0].text
    assert "running" in column(browser, "status")
    browser = opened(report.write(make_run(tmp_path / "empty", trials=0)))
    assert "No trial has started" in find(browser, "main")[0].text


def test_a_comparison_is_drawn(opened, tmp_path):
    folders = [str(make_run(tmp_path / name, trials=trials, seed=trials)) for name, trials in (("a", 24), ("b", 30))]
    browser = opened(run_report(Flags(tuple(folders))))
    draw_all(browser)
    assert [one.get_attribute("data-figure") for one in find(browser, "[data-drawn]")] == [
        "compared-time",
        "compared-epochs",
    ]
    assert len(find(browser, "[data-figure=compared-time] .scatterlayer .trace")) == 2
