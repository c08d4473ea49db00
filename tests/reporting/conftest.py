"""What the tests of reports share."""

from collections.abc import Iterator

import pytest
from selenium import webdriver

from browser_helpers import new_window


@pytest.fixture(scope="module")
def window() -> Iterator[webdriver.Chrome]:
    window = new_window("en")
    yield window
    window.quit()
