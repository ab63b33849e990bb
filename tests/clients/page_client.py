"""The page at / in a browser: chat, stop, keys, victims and attacks, by keyboard and mouse.

`python page_client.py demo=URL h200=URL locked=URL`, as tests/clients/run.py does. Needs Chromium:
$CHROMIUM, or what the system has. SHOTS=FOLDER: also takes the pictures that the docs show.
"""

import json
import os
import re
import shutil
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.request import Request, urlopen

from playwright.sync_api import expect, sync_playwright

PATIENCE_MS = 60_000
KEY = "open-sesame"


def chromium():
    """Where it is."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if found is None:
        sys.exit("no Chromium: install it (Debian: apt-get install chromium), or name it: CHROMIUM")
    return found


@contextmanager
def opened(browser, url, scheme="light"):
    """The page, which must not have complained by the time it is left."""
    page = browser.new_page(viewport={"width": 1280, "height": 860}, color_scheme=scheme)
    page.set_default_timeout(PATIENCE_MS)
    faults = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda line: faults.append(line.text) if line.type == "error" else None)
    page.on("request", lambda asked: asked.url.startswith(url) or faults.append(asked.url))
    page.goto(url)
    yield page
    page.close()
    assert faults == [], faults


def metric(url, name, label=""):
    with urlopen(f"{url}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(x.split()[-1]) for x in lines if re.match(rf"{name}\b", x) and label in x)


def wait_until(condition, what):
    deadline = time.monotonic() + PATIENCE_MS / 1e3
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def check_chat(browser, url):
    """A question by keyboard alone; an answer in pieces; the next one remembers; clear."""
    with opened(browser, url) as page:
        expect(page.locator("#model")).to_have_text("duetjax-demo", timeout=PATIENCE_MS)
        page.focus("#question")
        page.keyboard.type("What is TTFT?")
        page.keyboard.press("Enter")
        answer = page.locator("#log .assistant").first
        expect(answer).to_contain_text("first token", timeout=PATIENCE_MS)
        expect(page.locator("#timing")).to_contain_text("first token after", timeout=PATIENCE_MS)
        expect(page.locator("#question")).to_be_focused()
        page.keyboard.press("Tab")
        expect(page.locator("#send")).to_be_focused()
        page.keyboard.press("Enter")  # the placeholder's question, after the first
        expect(page.locator("#log .user")).to_have_count(2)
        expect(page.locator("#send")).to_be_enabled(timeout=PATIENCE_MS)
        page.click("#clear")
        expect(page.locator("#log div")).to_have_count(0)


def check_stop(browser, url):
    """Esc ends an answer, for the server too; so does closing the page."""
    with opened(browser, url) as page:
        expect(page.locator("#model")).to_have_text("llama-3.1-8b", timeout=PATIENCE_MS)
        page.fill("#question", "Go on and on.")
        page.press("#question", "Enter")
        expect(page.locator("#log .assistant").first).not_to_be_empty(timeout=PATIENCE_MS)
        page.keyboard.press("Escape")
        expect(page.locator("#send")).to_be_enabled()
        wait_until(lambda: metric(url, "vllm:num_requests_running") == 0, "Esc ended nothing")
        page.click("#victims")
        wait_until(lambda: metric(url, "vllm:num_requests_running") == 4, "no victims")
    wait_until(lambda: metric(url, "vllm:num_requests_running") == 0, "a closed page goes on")


def check_attack(browser, url, shots):
    """With duet on the victims' gaps stay shorter than with it off, and the split is seen."""
    with opened(browser, url, "dark") as page:
        expect(page.locator("#model")).to_have_text("llama-3.1-8b", timeout=PATIENCE_MS)
        page.fill("#count", "16")
        page.fill("#length", "30000")
        page.click("#victims")
        page.wait_for_timeout(2000)
        attack, rows = page.locator("#attack"), page.locator("#figures tr")
        page.keyboard.press("Alt+a")
        expect(attack).to_be_disabled()
        expect(attack).to_be_enabled(timeout=PATIENCE_MS)
        page.wait_for_timeout(1500)
        page.uncheck("#duet")
        page.wait_for_timeout(1500)
        attack.click()
        expect(attack).to_be_enabled(timeout=PATIENCE_MS)
        page.wait_for_timeout(1000)
        found = [row.locator("td").all_inner_texts() for row in rows.all()]
        for scheme in ("dark", "light") if shots else ():
            page.emulate_media(color_scheme=scheme)
            page.wait_for_timeout(300)
            page.screenshot(path=f"{shots}/page-{scheme}.png")
        on, off = ({"gaps": int(x[0]), "worst": float(x[3]), "ttft": float(x[5])} for x in found)
        print("  duet on", on, "off", off, flush=True)
        assert min(on["gaps"], off["gaps"]) > 32
        assert on["worst"] < off["worst"]
        assert metric(url, "duetjax_decisions_total", 'outcome="split"') > 0
        expect(page.locator("#error")).to_contain_text("median error")


def check_key(browser, url):
    """Without the key the page says so; with it, it works; a reload remembers."""
    with opened_despite_401(browser, url) as page:
        expect(page.locator("#state")).to_contain_text("API key", timeout=PATIENCE_MS)
        page.fill("#key", KEY)
        page.press("#key", "Enter")
        expect(page.locator("#model")).to_have_text("duetjax-demo", timeout=PATIENCE_MS)
        page.reload()
        expect(page.locator("#model")).to_have_text("duetjax-demo", timeout=PATIENCE_MS)


@contextmanager
def opened_despite_401(browser, url):
    page = browser.new_page()
    page.goto(url)
    yield page
    page.close()


def check_frozen_page(browser, url):
    """A page that reads nothing any more costs others nothing."""
    calm = seconds(url)
    with opened(browser, url) as page:
        expect(page.locator("#model")).to_have_text("llama-3.1-8b", timeout=PATIENCE_MS)
        page.fill("#count", "32")
        page.click("#victims")
        wait_until(lambda: metric(url, "vllm:num_requests_running") == 32, "no victims")
        beside = seconds(url)
        session = page.context.new_cdp_session(page)
        session.send("Debugger.enable")
        session.send("Debugger.pause")  # reads nothing, and its connections stay
        frozen = seconds(url)
        session.send("Debugger.disable")
    took = f"{calm:.2f} s alone, {beside:.2f} s beside a page, {frozen:.2f} s beside a frozen one"
    print(f"  256 tokens: {took}", flush=True)
    assert frozen < 2 * beside + 1


def seconds(url):
    """Of a completion of 256 tokens."""
    body = {"model": "llama-3.1-8b", "prompt": [5, 6, 7], "max_tokens": 256, "ignore_eos": True}
    asked = Request(f"{url}/v1/completions", json.dumps(body).encode())
    asked.add_header("content-type", "application/json")
    began = time.monotonic()
    with urlopen(asked) as answer:
        assert json.load(answer)["usage"]["completion_tokens"] == 256
    return time.monotonic() - began


def main():
    urls = dict(argument.split("=", 1) for argument in sys.argv[1:])
    shots = os.environ.get("SHOTS")
    if shots:
        Path(shots).mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        for check, *arguments in (
            (check_chat, urls["demo"]),
            (check_stop, urls["h200"]),
            (check_attack, urls["h200"], shots),
            (check_frozen_page, urls["h200"]),
            (check_key, urls["locked"]),
        ):
            check(browser, *arguments)
            print(f"{check.__name__}: passed", flush=True)
        browser.close()


if __name__ == "__main__":
    main()
