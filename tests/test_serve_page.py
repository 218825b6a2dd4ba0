"""The live page in a real browser: streaming, targets by mouse and keyboard, files, and all that can break."""

from __future__ import annotations

import json
import threading
import time

import pytest
import torch
import uvicorn

from flashtrace_plugin import reasoner
from flashtrace_plugin.methods.recording import Recording
from flashtrace_plugin.serve import engine as engines
from flashtrace_plugin.serve.app import live_page
from flashtrace_plugin.serve.guard import Address
from flashtrace_plugin.serve.run import _listening
from tests.browser import launched, missing

PROMPT = "v55 v20 ; the grass is green . v7 84 ; v20 12 ; v3 9 ; ? v55 think"
GENERATION = "<think> v55 v20 ; v20 12 ; </think> 12"
HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>\x1b[31m\u202e"
WAIT = 20_000


class Served:
    """A server in a thread."""

    def __init__(self, loaded, address=None) -> None:
        address = address or Address("127.0.0.1")
        self.listener = _listening("127.0.0.1", 0)
        config = uvicorn.Config(live_page(*loaded, address), log_level="error", timeout_graceful_shutdown=1)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]})
        self.thread.start()
        self.address = f"http://localhost:{self.listener.getsockname()[1]}{address.base}"

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join()
        self.listener.close()


@pytest.fixture(scope="module")
def loaded():
    return reasoner.load()


@pytest.fixture(scope="module")
def browser():
    if missing():
        pytest.skip(str(missing()))
    with launched() as found:
        yield found


@pytest.fixture(scope="module")
def server(loaded, browser):
    made = Served(loaded)
    yield made
    made.stop()


@pytest.fixture
def context(browser):
    """Tabs of one user. Errors of the page's script and refusals of its policy fail the test."""
    made, wrong = browser.new_context(accept_downloads=True), []
    made.on("weberror", lambda error: wrong.append(str(error.error)))
    made.on("console", lambda message: wrong.append(message.text) if "Content Security" in message.text else None)
    yield made
    made.close()
    assert not wrong


def opened(context, server):
    """The page, ready, in a tab of its own."""
    page = context.new_page()
    page.set_default_timeout(WAIT)
    page.goto(server.address)
    page.wait_for_selector("body[data-ready]")
    return page


@pytest.fixture
def page(context, server):
    return opened(context, server)


def fill(page, prompt=PROMPT, generation=GENERATION):
    page.check("[value=plain]")
    page.fill(".field textarea", prompt)
    page.fill("#generation", generation)


def explained(page, words="12"):
    page.wait_for_function(
        "words => document.querySelector('#question').textContent.includes(`“${words}”`)", arg=words
    )
    page.wait_for_function("() => !document.querySelector('#status').textContent.includes('…')")
    return page.inner_text("#status")


def token(page, words, nth=-1):
    found = page.locator("#answer span").filter(has_text=words)
    return found.nth(nth if nth >= 0 else found.count() + nth)


def drag(page, first, last):
    """Drags with the mouse from the middle of one token to the end of another."""
    a, b = first.bounding_box(), last.bounding_box()
    page.mouse.move(a["x"] + a["width"] / 2, a["y"] + a["height"] / 2)
    page.mouse.down()
    page.mouse.move(b["x"] + b["width"] - 1, b["y"] + b["height"] / 2, steps=5)
    page.mouse.up()


@pytest.fixture
def slow(monkeypatch):
    """A model that writes ten words a second."""
    told = engines._Streamer.on_finalized_text

    def slowly(self, text, stream_end=False):
        time.sleep(0.1)
        told(self, text, stream_end)

    monkeypatch.setattr(engines._Streamer, "on_finalized_text", slowly)


def test_it_writes_and_explains_and_a_dragged_target_costs_no_pass(page, slow):
    page.check("[value=plain]")
    page.fill(".field textarea", PROMPT)
    page.click("#write")
    page.wait_for_function("() => document.querySelector('#generation').value.includes('v55')")
    assert "12" not in page.input_value("#generation")  # it is still writing
    assert "model pass" in explained(page)
    assert page.input_value("#generation").strip() == GENERATION
    assert page.locator("#strongest li").count() >= 1 and page.locator("#rows tr").count() > 3
    assert page.locator("#prompt span[class^=s]").count() > 3 and page.locator(".asked").all_inner_texts() == [" 12"]
    assert page.locator(".thought").count() == 6
    drag(page, token(page, "v20", 0), token(page, ";", 0))
    assert "no model pass, hops" in explained(page, "v20 ;")
    assert page.locator(".asked").count() == 2
    page.select_option("#method", "flashtrace")
    page.wait_for_function("() => document.querySelector('#status').textContent.startsWith('flashtrace: model pass')")
    assert page.locator(".asked").count() == 2  # another method, the same target
    token(page, "12").dblclick()
    explained(page)


def test_by_keyboard_and_to_a_screen_reader(page):
    fill(page)
    page.select_option("#method", "flashtrace")
    page.focus("#explain")
    page.keyboard.press("Enter")
    explained(page)
    assert "Strongest source of 12" in page.inner_text("#spoken")
    page.focus("#answer")
    page.keyboard.press("Home")
    for _ in range(2):
        page.keyboard.press("ArrowRight")
    page.keyboard.press("Shift+ArrowRight")
    assert page.inner_text("#spoken") == "v20 ;"
    page.keyboard.press("Enter")
    assert "no model pass" in explained(page, "v20 ;")
    page.fill("#words", "v20 12 ;")
    page.press("#words", "Enter")
    explained(page, "v20 12 ;")
    page.fill("#words", "banana")
    page.press("#words", "Enter")
    page.wait_for_selector("#wrong:visible")
    assert "occurs 0 times" in page.inner_text("#wrong")


def test_units_and_the_table_show_their_place(page):
    fill(page, "the grass is green . v7 84 ;")
    page.click("#add-document")
    page.locator(".field textarea").nth(1).fill("v20 12 ; ? v20 think")
    page.fill("#generation", "<think> v20 12 ; </think> 12")
    page.select_option("#method", "ifr")
    page.click("#explain")
    explained(page)
    by_token = page.locator("#prompt span").evaluate_all("all => new Set(all.map(one => one.className)).size")
    page.select_option("#unit", "field")
    by_field = page.locator("#prompt span").evaluate_all("all => new Set(all.map(one => one.className)).size")
    assert by_field <= 4 < by_token
    assert page.locator("#rows td:nth-child(2)").all_inner_texts() == ["Document 1", "Text 1"]
    page.locator("#rows button").first.click()
    assert page.locator(".marked").count() >= 5
    fill(page)
    assert page.locator("body.stale").count() == 1  # what is shown is of another text


def test_hostile_text_is_inert(page):
    fill(page, f"{HOSTILE} v20 12 ; ? v20 think", f"<think> {HOSTILE} </think> 12 {HOSTILE}")
    page.click("#explain")
    page.wait_for_selector("#found:visible")
    assert page.title() == "FlashTrace live" and page.locator("main img, main script").count() == 0
    page.set_input_files(
        "#file", {"name": "x.json", "mimeType": "", "buffer": json.dumps({"format": HOSTILE}).encode()}
    )
    page.wait_for_selector("#wrong:visible")
    assert HOSTILE[:20] in page.inner_text("#wrong") and page.title() == "FlashTrace live"


def test_samples_and_attributions_are_files(page, context, server):
    fill(page)
    page.select_option("#method", "flashtrace")
    page.click("#explain")
    explained(page)
    drag(page, token(page, "v20", 0), token(page, ";", 0))
    explained(page, "v20 ;")
    values = page.locator("#prompt span").evaluate_all("all => all.map(one => one.className)")
    files = {}
    for name in ("sample", "attribution"):
        with page.expect_download() as download:
            page.click(f"#save-{name}")
        files[name] = download.value.path()
    for name, path in files.items():
        other = opened(context, server)
        other.set_input_files("#file", path)
        explained(other, "v20 ;")
        assert (
            other.input_value(".field textarea") == PROMPT and other.input_value("#generation").strip() == GENERATION
        )
        assert other.locator("#prompt span").evaluate_all("all => all.map(one => one.className)") == values, name
        token(other, "12").click()
        explained(other)
    page.set_input_files("#file", {"name": "x.json", "mimeType": "", "buffer": b"{"})
    page.wait_for_selector("#wrong:visible")
    assert "not JSON" in page.inner_text("#wrong") and page.input_value(".field textarea") == PROMPT


def test_a_reload_in_the_middle_keeps_the_text_and_ends_the_job(page, slow):
    page.check("[value=plain]")
    page.fill(".field textarea", PROMPT)
    page.click("#write")
    page.wait_for_function("() => document.querySelector('#generation').value.includes('v20')")
    page.reload()
    page.wait_for_selector("body[data-ready]")
    assert page.input_value(".field textarea") == PROMPT and "v20" in page.input_value("#generation")
    fill(page)
    page.click("#explain")  # which would wait for the job if it had gone on for ever
    explained(page)


def test_stop_keeps_what_was_written(page, slow):
    page.check("[value=plain]")
    page.fill(".field textarea", PROMPT)
    page.click("#write")
    page.wait_for_function("() => document.querySelector('#generation').value.includes('v20')")
    page.click("#stop")
    assert page.inner_text("#status") == "Stopped"
    kept = page.input_value("#generation")
    page.wait_for_timeout(400)
    assert page.input_value("#generation") == kept and "</think>" not in kept


def test_two_tabs_wait_for_each_other_and_a_closed_one_makes_room(context, server, slow):
    first, second = opened(context, server), opened(context, server)
    first.check("[value=plain]")
    first.fill(".field textarea", PROMPT)
    first.click("#write")
    first.wait_for_function("() => document.querySelector('#generation').value.includes('v55')")
    fill(second)
    second.click("#explain")
    second.wait_for_function("() => document.querySelector('#status').textContent == 'Waiting: 1 before this'")
    first.close()
    explained(second)
    assert opened(context, server).input_value("#generation") == ""  # a text belongs to its tab


def test_too_little_memory_is_told_and_the_server_goes_on(page, monkeypatch):
    fill(page)
    with monkeypatch.context() as patch:

        def attribute(self, **where):
            raise torch.OutOfMemoryError("CUDA out of memory")

        patch.setattr(Recording, "attribute", attribute)
        page.click("#explain")
        page.wait_for_selector("#wrong:visible")
    assert "not enough memory for this (CUDA out of memory)" in page.inner_text("#wrong")
    page.click("#explain")
    explained(page)
    assert page.is_hidden("#wrong")


def test_a_stopped_server_is_told_and_nothing_typed_is_lost(context, loaded, slow):
    server = Served(loaded)
    try:
        page = opened(context, server)
        page.check("[value=plain]")
        page.fill(".field textarea", PROMPT)
        page.click("#write")
        page.wait_for_function("() => document.querySelector('#generation').value.includes('v55')")
    finally:
        server.stop()
    page.wait_for_selector("#wrong:visible")
    assert "What you typed is still here" in page.inner_text("#wrong")
    assert page.input_value(".field textarea") == PROMPT and "v55" in page.input_value("#generation")
    page.click("#explain")
    page.wait_for_function("() => document.querySelector('#wrong').textContent.includes('does not answer')")


def test_a_page_behind_a_token(context, loaded):
    server = Served(loaded, Address.of("127.0.0.1", token=True))
    try:
        page = opened(context, server)
        fill(page)
        page.click("#explain")
        explained(page)
        assert page.goto(server.address.replace(server.address.split("/")[3], "guess")).status == 403
    finally:
        server.stop()


def test_accessible(page):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    fill(page)
    page.click("#explain")
    explained(page)
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        found = axe.Axe().run(page)
        assert not found.response["violations"], found.generate_report()
