"""A real Chromium, and what several tests of pages look at in it."""

import json

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement


def new_window(language: str) -> webdriver.Chrome:
    """A window of a Chromium in a language; call `quit` at the end."""
    options = webdriver.ChromeOptions()
    arguments = ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--no-proxy-server")
    for argument in (*arguments, f"--lang={language}", "--window-size=1000,900"):
        options.add_argument(argument)
    options.add_experimental_option("prefs", {"intl.accept_languages": language})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options, webdriver.ChromeService("/usr/bin/chromedriver"))


def at(window: webdriver.Chrome, selector: str) -> WebElement:
    return window.find_element(By.CSS_SELECTOR, selector)


def texts(window: webdriver.Chrome, selector: str) -> list[str]:
    """The visible texts of elements."""
    return [element.text for element in window.find_elements(By.CSS_SELECTOR, selector)]


def complaints(window: webdriver.Chrome) -> list[str]:
    """What Chromium's console says, such as what the policy has blocked."""
    return [entry["message"] for entry in window.get_log("browser")]


def requests(window: webdriver.Chrome) -> list[str]:
    """The addresses that were asked for since the last call."""
    events = (json.loads(entry["message"])["message"] for entry in window.get_log("performance"))
    return [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]


def check_policy(window: webdriver.Chrome) -> None:
    """The page runs no script that was added to it and reaches no other host, and the console says so of both."""
    added = "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.hacked = 1'}))"
    window.execute_script(added)
    assert window.execute_script("return window.hacked") is None
    asked = window.execute_async_script("fetch('http://127.0.0.2:1/').then(arguments[0], e => arguments[0](String(e)))")
    assert "TypeError" in asked
    assert len([line for line in complaints(window) if "Content Security Policy" in line]) >= 2


def set_scheme(window: webdriver.Chrome, scheme: str) -> None:
    """Sets the system's colours: light or dark."""
    feature = {"name": "prefers-color-scheme", "value": scheme}
    window.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})


def set_width(window: webdriver.Chrome, width: int, height: int = 900) -> None:
    """Makes the page as wide as in such a window, in CSS pixels."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    window.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2.2) of an rgb() or rgba() colour."""
    channels = [int(number) / 255 for number in colour.partition("(")[2].split(")")[0].split(",")[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: str, second: str) -> float:
    """Contrast ratio (WCAG 2.2)."""
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)
