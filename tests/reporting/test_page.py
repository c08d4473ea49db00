"""The frame of a report, opened in a real Chromium."""

from pathlib import Path

import pytest
from markupsafe import Markup
from selenium import webdriver

from browser_helpers import (
    at,
    check_policy,
    complaints,
    contrast,
    luminance,
    new_window,
    requests,
    set_scheme,
    set_width,
    texts,
)
from common.errors import InputError
from helpers import file_size_limit
from reporting.page import Bilingual, Section, details, heading, join, paragraph, render, table, text_list, write_report

HOSTILE = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'> & \"水稻\" {title}"
TITLE = Bilingual("A report <b>", "报告 <b>")
WIDE = ["水" * 60, "x" * 300, *map(str, range(20))]


def sections() -> list[Section]:
    rows = [["query", "1,234", "56.7"], [HOSTILE, "5", "0.1"], WIDE]
    numbers = join([table([Bilingual("text", "文本"), "n", "%"], rows), heading(HOSTILE)])
    examples = join([text_list([HOSTILE, "x" * 500]), details("more", paragraph(HOSTILE))])
    return [Section(Bilingual("Numbers", "数字"), numbers), Section(Bilingual("Texts", "文本"), examples)]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    about = paragraph("of ", HOSTILE, name="quiet")
    write_report(path, TITLE, about, sections())
    return path


@pytest.mark.browser
def test_it_asks_nobody_and_shows_texts_as_texts(window: webdriver.Chrome, report: Path) -> None:
    requests(window)
    window.get(report.as_uri())
    assert [address for address in requests(window) if not address.startswith("data:")] == [report.as_uri()]
    assert complaints(window) == []
    assert at(window, "p.quiet").text == f"of {HOSTILE}"
    assert texts(window, "td")[3] == texts(window, "h3")[0] == texts(window, ".texts li")[0] == HOSTILE
    assert window.execute_script("return window.hacked") is None
    assert texts(window, "main script, main img") == []
    assert not at(window, "details p").is_displayed()
    at(window, "summary").click()
    assert at(window, "details p").text == HOSTILE


@pytest.mark.browser
def test_its_policy_runs_no_other_script_and_reaches_no_address(window: webdriver.Chrome, report: Path) -> None:
    window.get(report.as_uri())
    check_policy(window)


@pytest.mark.browser
def test_it_is_in_the_browser_s_language_and_switches(window: webdriver.Chrome, report: Path) -> None:
    window.get(report.as_uri())
    contents = texts(window, "nav a")
    assert (window.title, at(window, "h1").text, contents) == (TITLE.en, TITLE.en, ["Numbers", "Texts"])
    button = at(window, "#language")
    assert button.text == "中文"
    button.click()
    assert at(window, "html").get_attribute("lang") == "zh-CN"
    assert (window.title, at(window, "h1").text, button.text) == (TITLE.zh, TITLE.zh, "English")
    assert texts(window, "h2") == ["数字", "文本"]
    chinese = new_window("zh-CN")
    try:
        chinese.get(report.as_uri())
        assert (chinese.title, at(chinese, "#language").text) == (TITLE.zh, "English")
    finally:
        chinese.quit()


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_follows_the_system_s_colours(window: webdriver.Chrome, report: Path, scheme: str) -> None:
    set_scheme(window, scheme)
    window.get(report.as_uri())
    text, page = (at(window, "body").value_of_css_property(name) for name in ("color", "background-color"))
    assert (luminance(text) > luminance(page)) == (scheme == "dark")
    assert contrast(text, page) > 7
    for selector in (".quiet", "th", "a"):
        assert contrast(at(window, selector).value_of_css_property("color"), page) > 4.5


@pytest.mark.browser
@pytest.mark.parametrize("width", [400, 1600])
def test_it_fits_the_window(window: webdriver.Chrome, report: Path, width: int) -> None:
    """A wide table scrolls by itself."""
    set_width(window, width)
    window.get(report.as_uri())
    assert window.execute_script("return document.documentElement.scrollWidth") <= width
    assert window.execute_script("return document.querySelector('.scroll').scrollWidth") > width / 2


def test_contents_are_escaped_unless_they_are_markup() -> None:
    assert join(["<", Markup("<b>"), Bilingual("&", '"')], "|") == (
        '&lt;|<b>|<span lang="en">&amp;</span><span lang="zh-CN">&#34;</span>'
    )


def test_equal_reports_have_equal_bytes() -> None:
    assert render(TITLE, "about", sections()) == render(TITLE, "about", sections())


def test_a_report_that_does_not_fit_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old\n")
    with file_size_limit(100), pytest.raises(InputError, match=r"report.html: can't be written \(File too large\)"):
        write_report(path, TITLE, "", sections())
    assert path.read_text() == "old\n"
    assert list(tmp_path.iterdir()) == [path]
