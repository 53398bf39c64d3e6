"""The page at / in a headless browser. Needs Chromium (apt install chromium)."""

import json
import re

import pytest
from helpers import browser
from helpers.adapters import write_adapter_for
from helpers.serving import running_server, slow_steps, until

from softprompt.serving.page import STATIC
from softprompt.utils import redact

needs_browser = pytest.mark.skipif(browser.FOUND is None, reason=f"no browser here: none of {', '.join(browser.NAMES)}")
LOADED = "document.querySelector('select').options.length > 1"
IDLE = "!document.querySelector('#send').hidden"
ANSWERS = "[...document.querySelectorAll('.words')].map(e => e.textContent)"
QUESTIONS = "[...document.querySelectorAll('.question')].map(e => e.textContent)"
TOO_WIDE = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
EVIL = '<img src=x onerror="document.title=1">'  # a name of an adapter, and a message
MOOD = ["正面", "负面"]


@pytest.fixture(scope="module")
def tab():
    opened = browser.Browser()
    yield opened
    opened.close()


@pytest.fixture
def page(tab, server):
    """The tab, with the page of the server and two panels: a0 and a1."""
    tab.requests.clear(), tab.complaints.clear()
    tab.open(f"{server.url}/", 1280, 800)
    wait(tab, LOADED)
    tab.ask("document.querySelector('#two').click()")
    return tab


def wait(tab: browser.Browser, condition: str) -> None:
    until(lambda: tab.ask(condition), 30)


def write(tab: browser.Browser, text: str, field: str = "text") -> None:
    tab.ask(f"document.querySelector('#{field}').value = {json.dumps(text)}")


def press_enter(tab: browser.Browser, **more: int) -> None:
    key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r", **more}
    tab.ask("document.querySelector('#text').focus()")
    tab("Input.dispatchKeyEvent", type="keyDown", **key)
    tab("Input.dispatchKeyEvent", type="keyUp", **key)


@needs_browser
def test_two_adapters_answer_side_by_side_as_they_write(page, server):
    assert page.ask("[...document.querySelectorAll('select')].map(e => e.value)") == ["a0", "a1"]
    with slow_steps(server.model, 0.3):
        write(page, "我爱这部电影")
        press_enter(page)
        wait(page, f"{ANSWERS}.every(Boolean) && {ANSWERS}.length === 2")  # both have begun
        begun = page.ask(ANSWERS)
        wait(page, IDLE)
    answers = page.ask(ANSWERS)
    assert answers == [server.ask(name, "我爱这部电影") for name in ("a0", "a1")]
    assert all(len(part) < len(whole) for part, whole in zip(begun, answers, strict=True))
    write(page, "为什么？")
    press_enter(page)
    wait(page, f"{IDLE} && {ANSWERS}.length === 4")
    said = [{"role": "user", "content": "我爱这部电影"}, {"role": "assistant", "content": answers[0]}]
    body = {"model": "a0", "messages": [*said, {"role": "user", "content": "为什么？"}]}
    wanted = server.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"]
    assert page.ask(ANSWERS)[1] == wanted
    assert all(url.startswith(server.url) for url in page.requests) and not page.complaints


@needs_browser
def test_only_enter_alone_sends(page):
    write(page, "甲")
    press_enter(page, modifiers=8)  # Shift
    assert page.ask("document.querySelector('#text').value.length") == 2 and page.ask(QUESTIONS) == []
    for of_composition in ("isComposing: true", "keyCode: 229"):
        event = f"new KeyboardEvent('keydown', {{key: 'Enter', cancelable: true, {of_composition}}})"
        assert page.ask(f"document.querySelector('#text').dispatchEvent({event})"), "the browser ends the composition"
    write(page, "   ")
    press_enter(page)
    assert page.ask(QUESTIONS) == []
    write(page, "乙\n")
    press_enter(page)
    wait(page, IDLE)
    assert page.ask(QUESTIONS) == ["乙", "乙"]


@needs_browser
def test_stop_frees_the_places_of_both_answers(page, server):
    with slow_steps(server.model, 0.02):
        page.ask("document.querySelector('#max_tokens').value = 900")
        write(page, "你好")
        press_enter(page)
        wait(page, f"{ANSWERS}.some(Boolean)")
        assert len(server.service.replies) == 2
        page.ask("document.querySelector('#stop').click()")
        wait(page, IDLE)
        until(lambda: not server.service.replies, 5)
    assert page.ask("[...document.querySelectorAll('.answer .note')].map(e => e.textContent)") == ["Stopped."] * 2


@needs_browser
def test_choices_are_bars_of_their_probabilities(page, server):
    page.ask("document.querySelector('[value=choices]').click()")
    write(page, "正面", "choices")
    write(page, "好")
    press_enter(page)
    assert page.ask("document.querySelector('#choices').validationMessage") and page.ask(QUESTIONS) == []
    write(page, "\n".join(MOOD), "choices")
    press_enter(page)
    wait(page, f"{IDLE} && document.querySelectorAll('.bar').length === 4")
    shown = page.ask("[...document.querySelectorAll('.choice')].map(e => e.textContent)")
    widths = page.ask("[...document.querySelectorAll('.bar')].map(e => parseFloat(e.style.width))")
    best = page.ask("[...document.querySelectorAll('.best .name')].map(e => e.textContent)")
    wanted, labels = [], []
    for name in ("a0", "a1"):
        got = server.post("/v1/classify", {"model": name, "input": "好", "choices": MOOD}).json()["data"][0]
        wanted += [(each["choice"], 100 * each["probability"]) for each in got["choices"]]
        labels.append(got["label"])
    assert shown == [f"{choice}{percent:.1f} %" for choice, percent in wanted] and best == labels
    assert widths == pytest.approx([percent for _, percent in wanted], abs=0.06)


@needs_browser
def test_errors_are_told_in_words_and_texts_are_no_html(mini, tab, tmp_path):
    write_adapter_for(tmp_path / EVIL, mini.base, "mini", P=2)
    with running_server(mini, tmp_path, max_prompt_tokens=60) as server:
        tab.complaints.clear()
        tab.open(f"{server.url}/", 1280, 800)
        wait(tab, LOADED)
        write(tab, EVIL)
        press_enter(tab)
        wait(tab, f"{IDLE} && {ANSWERS}[0]")
        assert tab.ask(QUESTIONS) == [EVIL] and tab.ask("document.querySelector('.from').textContent") == EVIL
        assert tab.ask("document.images.length") == 0 and tab.ask("document.title") == "softprompt"
        write(tab, "我爱" * 200)
        press_enter(tab)
        wait(tab, "document.querySelector('.error') !== null")
        assert "60 tokens" in tab.ask("document.querySelector('.error').textContent")
    write(tab, "?")
    press_enter(tab)
    wait(tab, "document.querySelectorAll('.error').length === 2")
    assert "does not answer" in tab.ask("document.querySelectorAll('.error')[1].textContent")


@needs_browser
def test_the_page_asks_for_the_key_and_keeps_it_for_the_session(mini, mini_adapters, tab, monkeypatch):
    monkeypatch.setattr(redact, "_added", set())
    with running_server(mini, mini_adapters, api_key="schlüssel 钥") as server:
        tab.open(f"{server.url}/")
        for key, told in (("wrong", "wants"), ("schlüssel 钥", "ncorrect")):
            wait(tab, f"document.querySelector('#key-said').textContent.includes('{told}')")
            assert tab.ask("document.querySelector('#key-dialog').open")
            write(tab, key, "key")
            tab.ask("document.querySelector('#key-form button').click()")
        wait(tab, LOADED)
        assert not tab.ask("document.querySelector('#key-dialog').open")
        assert tab.ask("[sessionStorage.length, localStorage.length, document.cookie]") == [1, 0, ""]
        write(tab, "你好")
        press_enter(tab)
        wait(tab, f"{IDLE} && {ANSWERS}[0]")


@needs_browser
def test_the_page_fits_screens_and_follows_the_color_scheme(server, tab):
    inks = set()
    for width, scheme in ((1280, "light"), (390, "dark"), (320, "light")):
        tab.open(f"{server.url}/", width, 800, prefers_color_scheme=scheme)
        wait(tab, LOADED)
        for selector in ("#two", "[value=choices]", "summary"):
            tab.ask(f"document.querySelector('{selector}').click()")
        write(tab, "\n".join(["w" * 300, "没有空格的很长的一句话" * 9]), "choices")
        write(tab, "w" * 1500)
        press_enter(tab)
        wait(tab, f"{IDLE} && document.querySelectorAll('.bar').length === 4")
        assert tab.ask(TOO_WIDE) == 0, width
        assert tab.ask("document.documentElement.scrollHeight - innerHeight") <= 0, width
        assert tab.ask("document.querySelector('#send').getBoundingClientRect().right") <= width
        inks.add(tab.ask("getComputedStyle(document.body).backgroundColor"))
    assert len(inks) == 2


@needs_browser
def test_the_page_is_chinese_where_the_browser_is(server, tab):
    tab.speak("zh-TW")
    try:
        tab.open(f"{server.url}/", 390, 800)
        wait(tab, LOADED)
        tab.ask("[...document.querySelectorAll('option')].forEach(option => option.remove())")  # names of adapters
        shown = tab.ask("document.body.textContent + document.querySelector('#panel').innerHTML")
        fields = tab.ask("[...document.querySelectorAll('*')].map(e => (e.placeholder ?? '') + (e.ariaLabel ?? ''))")
        english = set(re.findall("[A-Za-z]{2,}", re.sub("<[^>]*>", "", shown) + "".join(fields)))
        assert english == {"softprompt", "API"} and tab.ask("document.documentElement.lang") == "zh-CN"
        press_enter(tab)
        assert "消息" in tab.ask("document.querySelector('#text').validationMessage")
        assert tab.ask(TOO_WIDE) == 0
    finally:
        tab.speak("en-US")


@needs_browser
def test_each_text_of_the_script_has_a_translation(page):
    texts = re.findall(r'\bt\("(.*?)"\)', (STATIC / "page.js").read_text())
    assert len(texts) > 5 and set(texts) <= set(page.ask("Object.keys(ZH)"))


def test_the_files_of_the_page_may_only_speak_with_their_server(server):
    scripts = dict.fromkeys(("/page.js", "/zh.js"), "javascript")
    for path, kind in {"/": "text/html", **scripts, "/page.css": "text/css", "/icon.svg": "svg"}.items():
        got = server.get(path)
        assert got.status_code == 200 and kind in got.headers["content-type"], path
        policy = got.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy
        assert "http://" not in got.text.replace("http://www.w3.org", "") and "https://" not in got.text
    assert server.post("/", {}).status_code == 405
