"""The report and the walk in a real browser: by mouse, by keyboard, and legible."""

import json
import shutil
import subprocess
import sys
import urllib.error
import urllib.request

import helpers
import pytest

pytestmark = pytest.mark.slow

SIZES = [
    pytest.param({"width": 1280}, id="wide"),
    pytest.param({"width": 375, "dark": True}, id="narrow and dark"),
]


@pytest.fixture(scope="module")
def pages(tmp_path_factory, cache_dir):
    """A folder with a run, another one, and the pages of them."""
    folder = tmp_path_factory.mktemp("pages")
    (folder / "text.txt").write_text(helpers.TEXT)

    def command(*argv):
        result = subprocess.run(
            [sys.executable, "-m", "gptjax", *argv], cwd=folder, capture_output=True, text=True,
            env=helpers.command_environment(cache_dir),
        )  # fmt: skip
        assert result.returncode == 0 and not result.stderr, result.stderr

    command("train", *helpers.TINY, "--run-dir", "run")
    command("train", *helpers.TINY, "--run-dir", "wide", "--n-embd", "32", "--max-steps", "20")
    command("report", "run")
    command("report", "run", "wide", "--out", "both.html")
    command("explain", "run", "--prompt", "now is the", "--out", "explain.html")
    shutil.move(folder / "run" / "report.html", folder / "one.html")
    return folder


@pytest.mark.parametrize("size", SIZES)
def test_a_report_answers_its_controls(pages, open_page, assert_accessible, size):
    page = open_page(f"file://{pages}/one.html", **size)
    assert page.locator("h1").inner_text() == "run"
    assert page.locator("#loss .main-svg").count()
    assert_accessible(page)
    page.get_by_role("button", name="log").click()
    page.get_by_role("button", name="tokens").press("Enter")
    assert page.evaluate("document.getElementById('loss').layout.yaxis.type") == "log"
    assert page.locator("#loss").get_by_text("tokens").count()
    for unit, factor in (("bits per byte", 1 / 0.6931472), ("nats per token", 1)):
        page.get_by_role("button", name=unit).click()
        val = page.evaluate("document.getElementById('loss').data[2].y")
        logged = [row["val_loss"] for row in helpers.logged(pages / "run")]
        expected = [loss * factor for loss in logged if loss is not None]
        assert val == pytest.approx(expected)
    slider = page.get_by_role("slider", name="after step")
    last = page.locator("pre.sample").inner_text()
    slider.press("Home")
    events = [json.loads(line) for line in (pages / "run" / "history.jsonl").open()]
    texts = [event["text"] for event in events if event["event"] == "sample"]
    assert page.locator("pre.sample").text_content() == texts[0] != last
    overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert page.evaluate(overflow) == 0


def test_several_runs_say_what_differs(pages, open_page, assert_accessible):
    page = open_page(f"file://{pages}/both.html")
    rows = page.locator("#differences tbody tr").all_inner_texts()
    found = {tuple(row.split()) for row in rows}
    both = "40", "20"
    assert found == {
        ("model.n_embd", "16", "32"), ("max_steps", *both), ("optimizer.lr_decay_steps", *both)
    }  # fmt: skip
    assert_accessible(page)


def test_a_live_report_follows_its_run(pages, open_page, cache_dir):
    run_dir = shutil.copytree(pages / "run", pages / "live")
    server = subprocess.Popen(
        [sys.executable, "-m", "gptjax", "report", "live", "--live"], cwd=pages, text=True,
        stdout=subprocess.PIPE, env=helpers.command_environment(cache_dir),
    )  # fmt: skip
    try:
        address = server.stdout.readline().split()[0]
        page = open_page(address)
        row = helpers.logged(run_dir)[-1] | {"step": 50, "val_loss": 0.125}
        with (run_dir / "metrics.jsonl").open("a") as log:
            log.write(json.dumps(row) + "\n")
        page.get_by_text("0.1250").first.wait_for(timeout=10_000)
        page.locator("#sample").press("Home")
        shutil.rmtree(run_dir)
        page.get_by_text("Not renewed since").wait_for(timeout=10_000)
        open_page.wrong.clear()  # the browser's own word on the answer 503
        elsewhere = urllib.request.Request(address, headers={"Host": "evil.example:80"})
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(elsewhere)
    finally:
        server.send_signal(2)
        assert server.wait(10) == 130


@pytest.mark.parametrize("size", SIZES)
def test_heads_can_be_looked_at_by_mouse_and_keyboard(pages, open_page, assert_accessible, size):
    page = open_page(f"file://{pages}/explain.html", **size)
    assert_accessible(page)
    assert page.locator("section").count() == 14
    page.get_by_role("button", name="Layer 1, head 1").press("Enter")
    assert "Layer 1, head 1" in page.locator("#chosen").inner_text()
    tokens = page.locator("#row button")
    tokens.nth(2).focus()
    page.keyboard.press("Enter")
    shares = [text.split()[-1] for text in tokens.all_inner_texts()[:3]]
    assert abs(sum(int(share.rstrip("%")) for share in shares) - 100) <= 2
    assert page.evaluate("document.documentElement.scrollWidth") == size["width"]
