"""The page in a real browser (Chromium, by Playwright): what people do with it, with the pointer or
with the keyboard alone."""

import re
import time

import numpy as np
import pytest

pytest.importorskip("uvicorn", reason="serving needs starlette and uvicorn")
from local_server import serve

from gptjax.serving import engine

pytestmark = pytest.mark.slow
PROMPT = "RICHARD:\nNow"


@pytest.fixture(scope="module")
def served(tiny):
    with serve(tiny.run) as found:
        yield found


@pytest.fixture
def playground(open_page, served):
    def opened(**window):
        page = open_page(served.url, **window)
        page.wait_for_selector("#heads input")
        return page

    return opened


def write(page, length=40):
    """Generate from PROMPT, and wait for the end."""
    page.fill("#prompt", PROMPT)
    page.locator("#max_tokens").fill(str(length))
    page.click("#generate")
    page.wait_for_selector(f"#status:has-text('Done: {length} tokens')")


def text_of(page) -> str:
    return page.evaluate("document.getElementById('text').textContent")


def test_it_generates_and_regenerates(playground, served):
    page = playground()
    write(page)
    first, seed = text_of(page), int(page.inner_text("#count").removeprefix("seed "))
    expected = served.run.generate(
        PROMPT, max_new_tokens=40, temperature=0.8, top_k=0, seed=seed, overflow="half"
    )
    assert first == PROMPT + expected
    assert page.locator("#text .t").count() == len(PROMPT) + 40
    assert page.locator("#text .given").count() == len(PROMPT)
    page.fill("#prompt", "something else")  # does not matter to the next one
    page.click("#again")
    page.wait_for_function(
        "seed => !document.getElementById('count').textContent.endsWith(seed)", arg=f"seed {seed}"
    )
    page.wait_for_selector("#status:has-text('Done: 40 tokens')")
    assert text_of(page).startswith(PROMPT) and text_of(page) != first


def test_settings_are_sent(playground):
    page = playground()
    for name, value in (("temperature", "0"), ("top_k", "5"), ("top_p", "0.9")):
        page.locator(f"#{name}").fill(value)
    page.fill("#prompt", PROMPT)
    page.locator("#max_tokens").fill("20")
    with page.expect_request("**/v1/completions") as sent:
        page.click("#generate")
    body = sent.value.post_data_json
    assert (body["temperature"], body["top_k"], body["top_p"]) == (0, 5, 0.9)
    assert (body["max_tokens"], body["prompt"]) == (20, PROMPT)


def test_it_stops(playground, served, monkeypatch):
    decode = served.engine.decoder.decode

    def slowly(*arguments):
        time.sleep(0.02)
        return decode(*arguments)

    monkeypatch.setattr(served.engine.decoder, "decode", slowly)
    monkeypatch.setattr(engine, "CHUNK", 2)
    page = playground()
    page.locator("#max_tokens").fill("2000")
    page.click("#generate")
    page.wait_for_selector("#text .t >> nth=30")
    page.click("#stop")
    page.wait_for_selector("#status:has-text('Stopped')")
    page.wait_for_timeout(300)
    assert served.engine.busy == 0
    count = page.locator("#text .t").count()
    page.wait_for_timeout(200)
    assert page.locator("#text .t").count() == count


def test_a_token_shows_its_alternatives_and_where_it_looks(playground, served):
    page = playground()
    write(page)
    number = len(PROMPT) + 2  # its context fits the block
    with page.expect_response("**/api/attention") as answered:
        page.hover(f"#t{number}")
    logits = served.run.logits(text_of(page)[:number])[-1]
    chance = np.exp(logits - logits.max())
    chance /= chance.sum()
    best = chance.argsort()[::-1][:8]
    rows = page.locator("#choices li").all_inner_texts()
    assert 8 <= len(rows) <= 9
    shown = served.run.tokenizer.decode([best[0]]).replace("\n", "↵").replace(" ", "␣")
    assert rows[0].split()[0].removesuffix("✓") == shown
    assert float(rows[0].split()[-1].rstrip("%")) == pytest.approx(100 * chance[best[0]], abs=0.6)
    attention = answered.value.json()["attention"]
    expected = served.run.attention(text_of(page)[: number + 1])[:, :, -1]
    assert attention == pytest.approx(expected, abs=1e-4)
    page.locator("input[value='0-1']").check()
    most = int(expected[0, 1].argmax())
    back = number - most
    where = "itself" if back == 0 else f"{back} back"
    assert f"({where})" in page.inner_text("#most")
    assert (
        page.evaluate(f"document.getElementById('t{most}').style.getPropertyValue('--a')")
        == "1.000"
    )


def test_it_can_be_used_by_the_keyboard_alone(playground):
    page = playground()
    visited = []
    for _ in range(9):
        page.keyboard.press("Tab")
        visited.append(page.evaluate("document.activeElement.id || document.activeElement.value"))
    expected = "prompt temperature top_k top_p max_tokens generate stop again text".split()
    assert visited == expected
    page.focus("#prompt")
    page.keyboard.type(PROMPT)
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#status:has-text('Done: 300 tokens')")
    for _ in range(8):
        page.keyboard.press("Tab")
    chosen = "document.getElementById('text').getAttribute('aria-activedescendant')"
    assert page.evaluate(chosen) == f"t{len(PROMPT)}"
    page.keyboard.press("ArrowRight")
    assert page.evaluate(chosen) == f"t{len(PROMPT) + 1}"
    page.keyboard.press("ArrowDown")
    assert int(page.evaluate(chosen)[1:]) > len(PROMPT) + 1
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Home")
    assert page.evaluate(chosen) == "t0"
    assert "no probability" in page.inner_text("#about")
    page.keyboard.press("End")
    assert re.search(r"%\. Likeliest: ", page.inner_text("#spoken"))
    page.wait_for_selector("#most:has-text('Looks most at')")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.value") == "mean"
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.value") == "0-0"
    page.focus("#generate")
    page.keyboard.press("Enter")
    page.keyboard.press("Escape")
    page.wait_for_function("!document.getElementById('status').textContent.startsWith('Gen')")
    assert page.evaluate("document.activeElement.id") == "generate"  # focus is never lost


def test_what_is_wrong_is_said(playground, open_page):
    page = playground()
    page.fill("#prompt", "日本")
    with page.expect_response("**/v1/completions"):
        page.click("#generate")
    page.wait_for_selector("#error:has-text('is not one of')")
    assert open_page.wrong.pop().endswith("400 (Bad Request)")  # the browser's own remark


def test_a_refusal_is_shown_with_its_reason(open_page, served):
    page = open_page("about:blank")
    refusal = {"error": {"message": "this server is not called 'x'"}}
    page.route("**/v1/models", lambda route: route.fulfill(status=403, json=refusal))
    page.goto(served.url)
    page.wait_for_selector("#error:has-text(\"this server is not called 'x'\")")
    assert "403" in open_page.wrong.pop()
    page.unroute("**/v1/models")
    page.route("**/v1/models", lambda route: route.abort())
    page.goto(served.url)
    page.wait_for_selector("#error:has-text('The server does not answer.')")
    assert "ERR_FAILED" in open_page.wrong.pop()


def test_a_text_may_be_long(playground):
    page = playground()
    logprobs = "{tokens: ['x'], token_logprobs: [null], top_logprobs: [null], text_offset: [0]}"
    page.evaluate(f"""
        const ids = Array(500000).fill(0), text = "x".repeat(500000);
        add({{text, token_ids: [], prompt_token_ids: ids, logprobs: {logprobs}}});
    """)
    assert len(text_of(page)) == 500_000


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [375, 1280])
def test_it_is_legible_and_nothing_is_cut_off(playground, assert_accessible, dark, width):
    page = playground(width=width, dark=dark)
    assert_accessible(page)
    write(page, 100)
    page.click(f"#t{len(PROMPT) + 5}")
    page.wait_for_selector("#most:has-text('Looks most at')")
    assert_accessible(page)
    assert page.evaluate("document.documentElement.scrollWidth") == width


def test_nothing_moves_while_tokens_come(playground):
    page = playground(width=375)
    page.evaluate("""
        window.moved = [];
        const name = ({node}) => (node?.id ? node : node?.parentElement)?.id;
        const names = entry => entry.sources.map(name);
        const add = list => list.getEntries().forEach(entry => moved.push(...names(entry)));
        new PerformanceObserver(add).observe({type: "layout-shift", buffered: false});
    """)
    before = page.evaluate("document.getElementById('heads').getBoundingClientRect().top + scrollY")
    write(page, 300)
    page.wait_for_timeout(100)
    after = page.evaluate("document.getElementById('heads').getBoundingClientRect().top + scrollY")
    assert after == before and page.evaluate("moved") == []
