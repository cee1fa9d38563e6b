"""The demo's page in a browser, as a Space lays it out: describe a task, choose one, download its LoRA, mistakes."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.browser import browser
from tests.support.demo import trained_demo
from tests.support.helpers import ROOT

pytest.importorskip("gradio", reason='gradio is not installed: pip install -e ".[demo]"')
SECONDS = 120


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where the app answers, in a folder that has what the README uploads, and no more."""
    space = tmp_path_factory.mktemp("space")
    shutil.copytree(ROOT / "examples" / "space", space, dirs_exist_ok=True)
    for room in ("space", "support"):
        shutil.copytree(ROOT / "examples" / room, space / "examples" / room)
    trained_demo(space / "runs" / "space")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen([sys.executable, "app.py", "--port", str(port)], cwd=space, env=environment) as app:
        try:
            yield until(lambda: answers(f"http://127.0.0.1:{port}", app))
        finally:
            app.kill()


@pytest.fixture
def page(address: str, tmp_path: Path) -> Iterator[Any]:
    with browser(tmp_path) as driver:
        driver.get(address)
        # It answers what it shows at first.
        until(lambda: driver.find_elements("css selector", ".answers tbody tr"))
        yield driver


def until(found: Any) -> Any:
    """What is found, as soon as it is."""
    end = time.monotonic() + SECONDS
    while not (value := found()):
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.1)
    return value


def answers(address: str, app: subprocess.Popen[bytes]) -> str | None:
    assert app.poll() is None, "the app has ended"
    try:
        urllib.request.urlopen(address, timeout=5).close()
    except OSError:
        return None
    return address


def write(driver: Any, element: str, text: str) -> None:
    field = driver.find_element("css selector", f"#{element} textarea, #{element} input")
    field.send_keys("\ue009a\ue000\ue017" + text)


def press(driver: Any, button: str, done: Callable[[], bool]) -> None:
    """Press until it helps: a list hands over what was chosen a moment after it has closed."""

    def is_done() -> bool:
        driver.find_element("id", button).click()
        time.sleep(2)
        return done()

    until(is_done)


def options(driver: Any) -> list[Any]:
    """What the open list has, if there is one."""
    return list(driver.find_elements("css selector", "[role=option]"))


def pick_first(driver: Any, field: Any) -> str:
    """What a field says after a click on the first option of its list, which comes flying: a click may miss it."""
    field.click()
    time.sleep(1)
    for option in options(driver)[:1]:
        option.click()
    time.sleep(1)
    return str(field.get_attribute("value"))


def shown(driver: Any, element: str) -> str:
    return str(driver.find_element("id", element).text)


def test_a_description_is_answered_and_its_lora_comes_down(page: Any, tmp_path: Path) -> None:
    write(page, "texts", "Shares rose.\nThe team <b>won</b>.")
    write(page, "description", "Does it tell of a match?")
    page.find_element("id", "describe").click()
    until(lambda: "“Does it tell of a match?”" in shown(page, "answers"))
    rows = [row.text for row in page.find_elements("css selector", ".answers tbody tr")]
    assert [row.partition(".")[0] for row in rows] == ["Shares rose", "The team <b>won</b>"]
    assert all(sum(word in ("yes", "no") for word in row.split()) == 2 for row in rows)
    assert "Control, another task:" in shown(page, "answers")
    assert "Nearest trained tasks: “The article is" in shown(page, "answers")
    until(lambda: len(page.find_elements("css selector", "#map img, #sizes img")) == 2)
    until(lambda: page.find_element("id", "download").is_enabled())
    page.find_element("id", "download").click()
    [path] = until(lambda: list(tmp_path.glob("lora-*.zip")))
    with zipfile.ZipFile(path) as archive:
        names = {Path(name).name for name in archive.namelist()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names


def test_a_task_of_the_bank_is_answered(page: Any) -> None:
    [tab] = [one for one in page.find_elements("css selector", "button[role=tab]") if one.text == "Choose a task"]
    tab.click()
    field = until(lambda: page.find_element("css selector", "#concept input"))
    until(field.is_displayed)
    field.click()
    # Of those that are still transparent the text is empty.
    texts = [option.get_attribute("aria-label") for option in until(lambda: options(page))]
    assert sum(text.endswith("(never trained)") for text in texts) == 2
    until(lambda: pick_first(page, field) == texts[0])
    press(page, "choose", lambda: f"“{texts[0]}”" in shown(page, "answers"))
    write(page, "concept", "colours\ue007")
    press(page, "choose", lambda: shown(page, "message").startswith("“colours” is no task of the bank. Choose one"))


def test_mistakes_are_told_and_clear_the_page(page: Any) -> None:
    write(page, "texts", " ")
    page.find_element("id", "describe").click()
    until(lambda: shown(page, "message") == "There is no text. Type at least one, a line for each.")
    until(lambda: not page.find_elements("css selector", ".answers"))
    until(lambda: not page.find_element("id", "download").is_enabled())
    write(page, "texts", "A text.")
    write(page, "description", "x" * 201)
    page.find_element("id", "describe").click()
    until(lambda: shown(page, "message").startswith("The description has 201 characters."))
    write(page, "description", "Is it short?")
    page.find_element("id", "describe").click()
    until(lambda: page.find_elements("css selector", ".answers"))
    assert shown(page, "message") == ""


def test_the_page_fits_a_phone_and_asks_no_one_else(page: Any, address: str) -> None:
    size = {"width": 420, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    assert page.execute_script("return document.documentElement.scrollWidth") <= 420
    asked = page.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert [name for name in asked if not name.startswith((address, "data:", "blob:"))] == []
