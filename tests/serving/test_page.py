"""The page in a real Chromium, on a real service."""

import json
import os
import signal
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

import export_model
import recall
from benchmarks.service_clients import HOST, Service, running_service, urlopen
from browser_helpers import at, check_policy, complaints, contrast, luminance, new_window, set_scheme, texts
from helpers import all_pairs, make_model_folder, new_model, write_pairs
from modeling.checkpoint import save_checkpoint
from retrieval.hybrid_search import MODES
from serving.page import PAGE_FILE

pytestmark = [pytest.mark.server, pytest.mark.browser]

QUERY, TITLE = all_pairs()[0]
HOSTILE = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'> & 水稻"
DOCUMENTS = [HOSTILE, "Deep Learning in 2019", *(title for _, title in all_pairs()[:60])]
KEY = "secret-key"
Browse = Callable[..., webdriver.Chrome]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the export and the index of a model of random weights that tells texts apart."""
    folder = tmp_path_factory.mktemp("page")
    ernie = make_model_folder(folder / "ernie", initializer_range=0.5)
    save_checkpoint(folder / "model_1", *new_model(ernie, pooling="mean"))
    params = ["--params_path", str(folder / "model_1")]
    assert export_model.main([*params, "--output_path", str(folder / "output")]) == 0
    write_pairs(folder / "corpus.csv", [(document,) for document in DOCUMENTS])
    options = ["--corpus_file", str(folder / "corpus.csv"), "--device", "cpu", "--ann", "exact"]
    for name, words in (("index", []), ("index_with_words", ["--lexical", "bm25"])):
        index = ["--index_dir", str(folder / name), "--recall_result_dir", str(folder)]
        assert recall.main([*params, *options, *words, *index]) == 0
    return folder


@pytest.fixture(scope="module")
def service(model: Path) -> Iterator[Service]:
    with running_service(model / "output", "--index_dir", str(model / "index"), "--threads", "1") as service:
        yield service


@pytest.fixture(scope="module")
def service_with_words(model: Path) -> Iterator[Service]:
    options = ["--index_dir", str(model / "index_with_words"), "--threads", "1"]
    with running_service(model / "output", *options) as service:
        yield service


@pytest.fixture(scope="module")
def browse() -> Iterator[Browse]:
    """Opens a window of Chromium in a language; all are closed at the end."""
    windows: dict[str, webdriver.Chrome] = {}

    def open_window(service: Service, query: str = "", language: str = "en", login: str = "") -> webdriver.Chrome:
        if language not in windows:
            windows[language] = new_window(language)
        windows[language].get(f"http://{login}{HOST}:{service.http_port}/{query}")
        return windows[language]

    yield open_window
    for window in windows.values():
        window.quit()


def wait(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def wait_for_hits(window: webdriver.Chrome) -> list[str]:
    """The documents that are shown once a search has been answered."""
    wait(lambda: "documents in" in at(window, "#status").text or "用时" in at(window, "#status").text)
    return texts(window, "#hits .document")


def api(service: Service, query: str, top_k: int, **mode: str) -> list[dict]:
    body = json.dumps({"query": query, "top_k": top_k, **mode}).encode()
    with urlopen(urllib.request.Request(f"http://{HOST}:{service.http_port}/search", body), timeout=30) as answer:
        return json.loads(answer.read())["results"][0]["hits"]


def test_a_query_is_typed_and_found(service: Service, browse: Browse) -> None:
    """With Enter; the hits are those of /search, and the address is a link to them."""
    window = browse(service)
    assert window.switch_to.active_element == at(window, "#query")
    window.switch_to.active_element.send_keys(TITLE, Keys.ENTER)
    hits = api(service, TITLE, 10)
    assert wait_for_hits(window) == [hit["document"] for hit in hits]
    assert hits[0]["document"] == TITLE
    assert texts(window, "#hits .rank") == [str(rank) for rank in range(1, 11)]
    assert texts(window, "#hits .score") == [f"cosine {hit['score']:.4f}" for hit in hits]
    assert at(window, "#status").text.startswith(f"10 of {len(DOCUMENTS)} documents in ")
    link = window.current_url
    first = browse(service, link.rpartition("/")[2])
    assert first.current_url == link
    assert wait_for_hits(first)[0] == TITLE
    assert at(first, "#query").get_attribute("value") == TITLE
    assert complaints(first) == []


def test_going_back_shows_the_search_before(service: Service, browse: Browse) -> None:
    window = browse(service, "?q=Deep+Learning+in+2019&top_k=1")
    assert wait_for_hits(window) == ["Deep Learning in 2019"]
    at(window, "#query").clear()
    at(window, "#query").send_keys(TITLE, Keys.ENTER)
    wait(lambda: texts(window, "#hits .document") == [TITLE])
    window.back()
    wait(lambda: texts(window, "#hits .document") == ["Deep Learning in 2019"])


def test_what_query_and_document_share_is_marked(service: Service, browse: Browse) -> None:
    """Words in any case, and runs of Chinese characters; a single one of several isn't marked."""
    window = browse(service, "?q=learning+IN+IoT&top_k=62")
    documents = wait_for_hits(window)
    line = window.find_elements(By.CSS_SELECTOR, "#hits li")[documents.index("Deep Learning in 2019")]
    assert [mark.text for mark in line.find_elements(By.TAG_NAME, "mark")] == ["Learning", "in"]
    window = browse(service, f"?q={QUERY}&top_k=62")
    documents = wait_for_hits(window)
    thing, aspect = QUERY.split("的")
    line = window.find_elements(By.CSS_SELECTOR, "#hits li")[documents.index(TITLE)]
    assert [mark.text for mark in line.find_elements(By.TAG_NAME, "mark")] == [thing + aspect, thing, aspect]


def test_documents_are_text(service: Service, browse: Browse) -> None:
    """And the policy would run nothing but the page's own script, and ask no other host."""
    window = browse(service, f"?q=水稻&top_k={len(DOCUMENTS)}")
    assert HOSTILE in wait_for_hits(window)
    assert window.execute_script("return window.hacked") is None
    assert window.find_elements(By.CSS_SELECTOR, "#hits script, #hits img") == []
    assert complaints(window) == []
    check_policy(window)


def test_enter_that_ends_a_composition_does_not_search(service: Service, browse: Browse) -> None:
    """As of a Chinese input method; the next Enter does."""
    window = browse(service)
    at(window, "#query").click()
    window.execute_cdp_cmd("Input.imeSetComposition", {"text": "shui'dao", "selectionStart": 8, "selectionEnd": 8})
    press(window, "Enter")
    assert at(window, "#query").get_attribute("value") == "shui'dao"
    assert "?q=" not in window.current_url and at(window, "#status").text == ""
    window.execute_cdp_cmd("Input.insertText", {"text": "水稻"})
    assert "?q=" not in window.current_url
    press(window, "Enter")
    assert wait_for_hits(window)
    assert at(window, "#query").get_attribute("value") == "水稻"


def press(window: webdriver.Chrome, key: str) -> None:
    """A key of the keyboard below the input method, which Selenium's keys don't go through."""
    event = {"key": key, "code": key, "windowsVirtualKeyCode": 13, "text": "\r"}
    for kind in ("keyDown", "keyUp"):
        window.execute_cdp_cmd("Input.dispatchKeyEvent", {"type": kind, **event})


def test_two_texts_are_compared(service: Service, browse: Browse) -> None:
    """By keyboard: the fields follow each other."""
    window = browse(service)
    at(window, "#first").send_keys("水稻的产量", Keys.TAB)
    window.switch_to.active_element.send_keys("水稻的产量", Keys.TAB)
    window.switch_to.active_element.send_keys(Keys.ENTER)
    wait(lambda: at(window, "#similarity").text == "cosine 1.0000")
    at(window, "#second").send_keys("2019", Keys.ENTER)
    wait(lambda: at(window, "#similarity").text not in ("", "cosine 1.0000", "Computing…"))
    assert float(at(window, "#similarity").text.removeprefix("cosine ")) < 0.9999


def test_an_error_a_slow_answer_and_an_empty_one(service: Service, browse: Browse) -> None:
    window = browse(service)
    window.execute_script("arguments[0].value = '水'.repeat(10001)", at(window, "#query"))
    at(window, "#query").send_keys(Keys.ENTER)
    wait(lambda: at(window, "#status").text)
    assert at(window, "#status").text == "That failed: text 0 has 10001 characters: send at most 10000"
    assert "bad" in at(window, "#status").get_attribute("class")
    assert texts(window, "#hits li") == []
    window = browse(service, "?q=水稻")
    assert wait_for_hits(window)
    os.kill(service.process.pid, signal.SIGSTOP)
    try:
        at(window, "#query").send_keys("2", Keys.ENTER)
        wait(lambda: at(window, "#status").text == "Searching…")
        assert texts(window, "#hits li") == []
    finally:
        os.kill(service.process.pid, signal.SIGCONT)
    assert wait_for_hits(window)
    nothing = "{ok: true, json: async () => ({index: {documents: 0, version: 'v', modes: []}, results: [{hits: []}]})}"
    window.execute_script(f"window.fetch = async () => ({nothing})")
    at(window, "#query").send_keys("3", Keys.ENTER)
    wait(lambda: at(window, "#status").text == "The index has no document for this query.")
    window.execute_script("window.fetch = async () => { throw new TypeError('Failed to fetch') }")
    at(window, "#query").send_keys("4", Keys.ENTER)
    wait(lambda: at(window, "#status").text == "That failed: the service doesn't answer")


def test_an_answer_that_comes_late_changes_nothing(service: Service, browse: Browse) -> None:
    window = browse(service)
    window.execute_script("""
        const own = window.fetch;
        window.fetch = async (path, options) => {
            if (options.body.includes("2019")) await new Promise((done) => { window.go = done; });
            return own(path, options);
        };
    """)
    at(window, "#query").send_keys("2019", Keys.ENTER)
    wait(lambda: at(window, "#status").text == "Searching…")
    at(window, "#query").clear()
    at(window, "#query").send_keys(TITLE, Keys.ENTER)
    hits = wait_for_hits(window)
    window.execute_script("window.go()")
    time.sleep(0.3)
    assert texts(window, "#hits .document") == hits
    assert hits[0] == TITLE


def test_the_way_that_found_a_hit_is_said(service: Service, browse: Browse) -> None:
    """Unless all are found by vectors."""
    window = browse(service)
    ways = json.dumps([{"document": way, "score": 0.125, "found_by": way} for way in MODES])
    answer = (
        f"{{index: {{documents: 3, version: 'v', model: 'm', modes: []}}, mode: 'hybrid', results: [{{hits: {ways}}}]}}"
    )
    window.execute_script(f"window.fetch = async () => ({{ok: true, json: async () => ({answer})}})")
    at(window, "#query").send_keys("a", Keys.ENTER)
    wait(lambda: texts(window, "#hits .document") == list(MODES))
    assert texts(window, "#hits .score") == ["0.1250 by vector", "0.1250 by words", "0.1250 by both"]
    assert at(window, "#about").text == "3 documents, index v, model m"


def test_the_mode_is_chosen(service_with_words: Service, browse: Browse) -> None:
    """By keyboard; it is in the link, and going back restores it. At first it is the service's default."""
    window = browse(service_with_words)
    wait(lambda: at(window, "#mode").is_displayed())
    assert texts(window, "#mode option") == ["vector and words", "vector", "words"]
    assert at(window, "#about").text.startswith(f"{len(DOCUMENTS)} documents, index ")
    at(window, "#query").send_keys(QUERY, Keys.ENTER)
    assert wait_for_hits(window) == [hit["document"] for hit in api(service_with_words, QUERY, 10)]
    assert window.current_url.endswith("&top_k=10&mode=hybrid")
    at(window, "#top_k").send_keys(Keys.TAB)
    assert window.switch_to.active_element == at(window, "#mode")
    window.switch_to.active_element.send_keys(Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.TAB)
    window.switch_to.active_element.send_keys(Keys.ENTER)
    hits = api(service_with_words, QUERY, 10, mode="lexical")
    scores = [f"{hit['score']:.4f} by words" for hit in hits]
    wait(lambda: texts(window, "#hits .score") == scores)
    assert texts(window, "#hits .document") == [hit["document"] for hit in hits]
    link = window.current_url
    assert link.endswith("&top_k=10&mode=lexical")
    window.back()
    wait(lambda: len(texts(window, "#hits .score")) == 10 and texts(window, "#hits .score") != scores)
    assert at(window, "#mode").get_attribute("value") == "hybrid"
    window = browse(service_with_words, link.rpartition("/")[2])
    wait(lambda: texts(window, "#hits .score") == scores)
    assert at(window, "#mode").get_attribute("value") == "lexical"


def test_without_words_there_is_no_mode_to_choose(service: Service, browse: Browse) -> None:
    """A link that asks for one says so; the next search doesn't ask for it."""
    window = browse(service, f"?q={TITLE}&mode=lexical")
    wait(lambda: at(window, "#status").text.startswith("That failed: the index has no words"))
    wait(lambda: at(window, "#about").text)
    assert not at(window, "#mode").is_displayed()
    at(window, "#query").send_keys(Keys.ENTER)
    assert wait_for_hits(window)[0] == TITLE
    assert not at(window, "#mode").is_displayed()
    assert "mode" not in window.current_url


def test_chinese_for_a_chinese_browser(service: Service, browse: Browse) -> None:
    window = browse(service, f"?q={TITLE}", language="zh-CN")
    assert wait_for_hits(window)[0] == TITLE
    assert at(window, "h1").text == window.title == "语义检索"
    assert at(window, "html").get_attribute("lang") == "zh-CN"
    assert at(window, "#status").text.startswith(f"{len(DOCUMENTS)} 篇文档中的 10 条结果，用时 ")
    assert at(window, "#search button").text == "搜索"


def test_the_modes_in_chinese(service_with_words: Service, browse: Browse) -> None:
    window = browse(service_with_words, language="zh-CN")
    wait(lambda: at(window, "#mode").is_displayed())
    assert at(window, "#modes span").text == "检索方式"
    assert texts(window, "#mode option") == ["向量和词", "向量", "词"]


def test_both_languages_have_all_texts() -> None:
    page = PAGE_FILE.read_text(encoding="utf-8")
    english, chinese = (page.partition(f"\n  {name}: {{")[2].partition("\n  },")[0] for name in ("en", "zh"))
    names = [[part.split(":")[0].strip() for part in text.split(",\n") if ":" in part] for text in (english, chinese)]
    assert names[0] == names[1] != []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_follows_the_system_s_colours(service: Service, browse: Browse, scheme: str) -> None:
    window = browse(service)
    set_scheme(window, scheme)
    text, page = (at(window, "body").value_of_css_property(name) for name in ("color", "background-color"))
    assert (luminance(text) > luminance(page)) == (scheme == "dark")
    assert contrast(text, page) > 7
    quiet = at(window, "#status").value_of_css_property("color")
    assert contrast(quiet, page) > 4.5
    button = at(window, "#search button")
    colours = (button.value_of_css_property(name) for name in ("color", "background-color"))
    assert contrast(*colours) > 4.5


def test_it_fits_a_phone(service_with_words: Service, browse: Browse) -> None:
    window = browse(service_with_words)
    size = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    window.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        window = browse(service_with_words, f"?q={TITLE}")
        assert wait_for_hits(window)
        assert at(window, "#mode").is_displayed()
        assert window.execute_script("return document.documentElement.scrollWidth") <= 360
        assert all(button.size["height"] >= 36 for button in window.find_elements(By.TAG_NAME, "button"))
    finally:
        window.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_service_with_keys_asks_for_one(model: Path, browse: Browse, tmp_path: Path) -> None:
    """As a password, which the browser then sends with every request."""
    (tmp_path / "keys").write_text(f"{KEY}\n")
    (tmp_path / "keys").chmod(0o600)
    options = ["--index_dir", str(model / "index"), "--api_key_file", str(tmp_path / "keys"), "--threads", "1"]
    with running_service(model / "output", *options) as service:
        with pytest.raises(urllib.error.HTTPError) as refused:
            urlopen(f"http://{HOST}:{service.http_port}/", timeout=30)
        assert refused.value.code == 401
        schemes = [challenge.split()[0] for challenge in refused.value.headers.get_all("WWW-Authenticate")]
        assert schemes == ["Bearer", "Basic"]
        window = browse(service, login=f"me:{KEY}@", language="en-GB")
        window.get(f"http://{HOST}:{service.http_port}/?q={TITLE}")
        assert wait_for_hits(window)[0] == TITLE
        assert KEY not in window.current_url
