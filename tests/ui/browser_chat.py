"""The page in headless Chromium: `make test-browser`. Not part of the other tests, since it needs a browser:
Playwright's own (`playwright install chromium-headless-shell`) or the system's (`CHROMIUM` may name it)."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from turbolm.llm import AsyncLLM
from turbolm.remote import RemoteLLM
from turbolm.types import SamplingParams
from turbolm.ui.chat import Chat

GREEDY = SamplingParams(temperature=0)
SYSTEM = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
SCREENSHOTS = os.environ.get("SCREENSHOTS")  # a folder to leave pictures in


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, SYSTEM)), None)
    flags = ["--disable-dev-shm-usage", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=flags, timeout=30_000)
        yield browser
        browser.close()


class Visit:
    """Somebody at the page."""

    def __init__(self, browser: Browser, address: str, width: int = 1280, height: int = 800) -> None:
        self.page: Page = browser.new_page(viewport={"width": width, "height": height})
        self.page.set_default_timeout(20_000)
        self.troubles: list[str] = []
        self.page.on("pageerror", lambda error: self.troubles.append(str(error)))
        self.page.on("console", lambda m: self.troubles.append(m.text) if m.type == "error" else None)
        self.page.on("request", lambda r: self._note(r.url, address))
        self.page.goto(address)
        self.box = self.page.locator("#message textarea")
        self.log = self.page.get_by_role("log")
        self.status = self.page.locator("#status")
        expect(self.box).to_be_editable(timeout=20_000)

    def _note(self, url: str, address: str) -> None:
        if not url.startswith((address, "data:", "blob:")):
            self.troubles.append(f"asks for {url}")

    def ask(self, text: str) -> None:
        self.box.fill(text)
        self.box.press("Enter")
        expect(self.box).to_have_value("")  # taken: from here on, the line below is about this answer

    def finished(self) -> None:
        expect(self.status).to_contain_text("first token", timeout=60_000)
        expect(self.page.locator("#message .submit-button")).to_be_visible()

    def field(self, name: str) -> Locator:
        return self.page.get_by_role("textbox", name=name)

    def press(self, name: str) -> None:
        self.page.get_by_role("button", name=name, exact=True).last.click()

    def picture(self, name: str) -> None:
        if SCREENSHOTS:
            self.page.screenshot(path=Path(SCREENSHOTS) / f"{name}.png")


def test_a_conversation_with_the_default_model(browser, serve_page, smollm2_path):
    engine = AsyncLLM(str(smollm2_path), progress=False, max_context=2048)
    visit = Visit(browser, serve_page(Chat(engine, GREEDY)))
    visit.ask("Hi! My name is Ada.")
    visit.finished()
    visit.ask("Write a Python function that reverses a string, and explain it.")
    visit.finished()
    expect(visit.log.locator("pre code").first).to_contain_text("def")
    visit.picture("desktop")
    visit.page.get_by_role("button", name="Toggle Sidebar").click()
    visit.field("max tokens").fill("5")
    visit.field("temperature").fill("hot")
    visit.ask("And now?")
    expect(visit.log).to_contain_text("temperature is 'hot'; give a number")
    visit.picture("settings")
    visit.field("temperature").fill("")
    visit.press("Retry")
    expect(visit.status).to_contain_text("at max_tokens: 5")
    assert not visit.troubles


def test_stop_in_mid_answer_frees_the_request(browser, serve_page):
    engine = AsyncLLM("null", progress=False, max_context=200_000)
    visit = Visit(browser, serve_page(Chat(engine, GREEDY)))
    visit.ask("never ends")
    expect(visit.status).to_contain_text("tokens/s")
    assert engine.stats.num_used_blocks > 0
    visit.page.locator("#message .stop-button").click()
    expect(visit.status).to_contain_text("stopped")
    visit.page.wait_for_timeout(200)
    assert engine.stats.num_used_blocks == 0
    visit.ask("again")
    expect(visit.log).to_contain_text("again")
    visit.page.close()  # a page that goes away frees its request too
    for _ in range(100):
        if not engine.stats.num_used_blocks:
            return
        time.sleep(0.1)
    raise AssertionError("the request of a closed page goes on")


def test_a_conversation_with_a_server(browser, serve_page, toy):
    engine = RemoteLLM(toy.url)
    visit = Visit(browser, serve_page(Chat(engine, engine.default_params)))
    visit.ask("think")
    visit.finished()
    expect(visit.log).to_contain_text("Decided.")
    expect(visit.log).not_to_contain_text("First I consider")  # folded
    visit.log.get_by_text("Thoughts").click()
    expect(visit.log).to_contain_text("First I consider")
    visit.ask("refuse")
    expect(visit.log).to_contain_text("this prompt is refused")
    visit.ask("x <foo>bar</foo> List<int> ![i](http://127.0.0.2/spy.png)")
    visit.finished()
    expect(visit.log).to_contain_text("You said: x <foo>bar</foo> List<int>")
    assert any("Content Security Policy" in trouble for trouble in visit.troubles)
    visit.press("Retry")
    for _ in range(100):
        visit.page.wait_for_timeout(50)
        if len(toy.bodies) == 4:
            break
    visit.finished()
    assert [body["messages"][-1]["content"][:5] for body in toy.bodies] == ["think", "refus", "x <fo", "x <fo"]
    visit.press("Edit")
    visit.log.locator("textarea").last.fill("edited")
    visit.press("Submit")
    expect(visit.log).to_contain_text("You said: edited")
    visit.finished()
    visit.press("Undo")
    expect(visit.box).to_have_value("edited")
    visit.ask("slow")
    expect(visit.log).to_contain_text(re.compile("word5 "))
    visit.page.locator("#message .stop-button").click()
    expect(visit.status).to_contain_text("stopped")
    assert toy.hung_up.wait(10)
    visit.press("Clear")
    expect(visit.log).not_to_contain_text("word5")


def test_two_pages_and_a_phone(browser, serve_page, toy):
    engine = RemoteLLM(toy.url)
    address = serve_page(Chat(engine, engine.default_params))
    one, two = Visit(browser, address), Visit(browser, address, 390, 844)
    one.ask("I am one")
    two.ask("markdown")
    one.finished()
    two.finished()
    expect(one.log).to_contain_text("You said: I am one")
    expect(two.log).not_to_contain_text("I am one")
    two.picture("phone")
    assert two.page.evaluate("document.documentElement.scrollWidth") <= 390
    assert not one.troubles + two.troubles
