"""The page in headless Chromium: what it shows is what sample.py prints, and everybody can use it.

python -m pytest -m browser tests/test_page.py
QUILL_SCREENSHOTS=docs python -m pytest -m browser tests/test_page.py -k screenshots      # writes docs/play*.png
"""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import prepare
import sample
from quill.generation import probabilities

ROOT = Path(__file__).parent.parent
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
BUNDLED = ROOT / "quill" / "play" / "microgpt.pt"
HOSTILE = "<img src=x onerror=window.harm=1>"

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium"),
]
for needed in ("playwright", "starlette", "uvicorn"):
    pytest.importorskip(needed, reason=f"pip install {needed}")

# ---------------------------------------------------------------- a server, a browser, a page


class Served:
    """play.py in a folder of its own."""

    def __init__(self, folder):
        self.folder, self.port, self.process = folder, 0, None

    def start(self):
        """Start it, on the port that it had before. → the address"""
        command = [sys.executable, str(ROOT / "play.py"), f"--port={self.port}"]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, cwd=self.folder, stdout=subprocess.PIPE, text=True, env=env)
        self.address = self.process.stdout.readline().strip()
        self.port = int(self.address.split(":")[2].split("/")[0])
        return self.address

    def kill(self):
        """End it as a crash would."""
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    prepare.main(["names", f"--data_dir={folder / 'data'}"])
    (folder / "out" / HOSTILE).mkdir(parents=True)
    shutil.copy(BUNDLED, folder / "out" / HOSTILE / "last.pt")
    server = Served(folder)
    server.start()
    yield server
    server.kill()
    for state in folder.glob("out/play/*/page/state.json"):  # runs outlive their server
        with suppress(ProcessLookupError):
            os.kill(json.loads(state.read_text(encoding="utf-8"))["pid"], signal.SIGTERM)


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser, served):
    """Open the page with options of a browser context. At the end: no error in the console, no foreign request."""
    contexts, problems, requests = [], [], []

    def open_page(run=None, expected=(), **options):
        options = {"viewport": {"width": 1280, "height": 720}, "reduced_motion": "reduce"} | options
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on(
            "console",
            lambda message: (
                problems.append(message.text)
                if message.type in ("error", "warning") and not any(text in message.text for text in expected)
                else None
            ),
        )
        page.goto(served.address)
        page.wait_for_selector("#bars [data-token]")
        if run:
            show(page, run)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert problems == []
    assert [url for url in requests if not url.startswith((f"http://127.0.0.1:{served.port}/", "data:"))] == []


def show(page, run):
    """Choose another run, and wait for its panels."""
    page.select_option("#run", run)
    wait_until(lambda: page.get_attribute("#main", "data-shown") == run)


def set_range(page, selector, value):
    """Drag a slider to `value`."""
    page.eval_on_selector(
        selector, "(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input')); }", value
    )


def token_text(answer):
    """The text that a response was asked for, if it is one to /api/token."""
    return answer.request.post_data_json["text"] if answer.url.endswith("/api/token") else None


def bars(page):
    """The shown bars: {token: probability}."""
    return page.eval_on_selector_all(
        "#bars [data-token]", "rows => Object.fromEntries(rows.map(r => [r.dataset.token, Number(r.dataset.p)]))"
    )


def state_of(served, run):
    """What train.py wrote for the page."""
    return json.loads((served.folder / "out" / run / "page" / "state.json").read_text(encoding="utf-8"))


def wait_until(condition, seconds=30):
    """Wait until `condition()` is true, and return what it returned."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError("it did not happen in time")


def start_run(page, **dials):
    """Start a run of config/microgpt.py on names with these dials. → its name"""
    page.click("#open-new")
    page.select_option("#config", "config/microgpt.py")
    assert page.input_value("#dataset") == "names"
    for name, value in dials.items():
        page.fill(f"#dial-{name}", str(value))
    with page.expect_response("**/api/start") as answer:
        page.click("#start")
    run = answer.value.json()["name"]
    wait_until(lambda: page.input_value("#run") == run)
    return run


@pytest.fixture(scope="module")
def trained(browser, served):
    """A finished run of 30 steps, which a page started. → its name"""
    page = browser.new_page()
    page.goto(served.address)
    page.wait_for_selector("#bars [data-token]")
    run = start_run(page, max_iters=30)
    wait_until(lambda: "finished" in page.inner_text("#status"), 60)
    page.close()
    return run


# ---------------------------------------------------------------- what it shows


def test_it_opens_on_something_alive(visit):
    page = visit()
    page.wait_for_selector("#texts .made")
    assert page.locator("#texts li").count() == 12
    assert page.inner_text("#counts") == "8,172 documents · 27 different tokens · 4,192 parameters"
    assert page.locator("#bars [data-token]").count() == 10
    assert [text.split("\n")[0] for text in page.locator("#ids li").all_inner_texts()] == ["<start>", "a", "n", "n"]
    assert page.get_attribute("#attention", "aria-label").startswith(
        "Attention of layer 0, head 0: “n” (3) looks most at “"
    )
    assert page.inner_text("#legend") == "This model: 2.339. Press Train for a curve."
    made = page.locator("#texts .made").count()
    assert page.inner_text("#star") == f"★ Not in the data: {made} of 12."


def test_bars_are_the_softmax_at_every_temperature(visit):
    page, asked = visit(), []
    with page.expect_response(lambda answer: token_text(answer) == "mar") as answer:  # and not one asked for before
        page.fill("#text", "mar")
    choices = answer.value.json()["choices"]
    wait_until(lambda: page.locator("#ids li").count() == 4)
    page.click("#more")
    assert page.locator("#bars [data-token]").count() == 27
    page.on("request", lambda request: asked.append(request.url) if "/api/token" in request.url else None)
    logits = torch.tensor([[choice["logit"] for choice in choices]])
    for temperature, top_k, top_p in [(0.5, None, None), (1.6, None, None), (1.6, 5, None), (1.6, None, 0.8)]:
        set_range(page, "#temperature", temperature)
        set_range(page, "#top-k", top_k or 27)
        set_range(page, "#top-p", top_p or 1)
        want = probabilities(logits, temperature, top_k, top_p)[0]
        want = (want / want.sum()).tolist()
        got = bars(page)
        assert [got[choice["token"]] for choice in choices] == pytest.approx(want, abs=1e-6)
        first = page.locator("#bars [data-token]").first.inner_text().split()
        assert first == [
            choices[0]["token"],
            *(f"{choices[0]['logit'] / t:.2f}" for t in (1, temperature)),
            f"{100 * want[0]:.1f}",
            "%",
        ]
    assert asked == []  # no request: the logits are the same


def test_drawing_takes_the_token_whose_part_holds_n(visit):
    page = visit()
    page.click("#more")
    for n in (0.0, 0.2, 0.53, 0.9, 0.999, None):
        if n is None:
            page.click("#draw")
        else:
            set_range(page, "#n", n)
        n, sum_before = float(page.input_value("#n")), 0.0
        for drawn, p in bars(page).items():
            token = drawn
            if sum_before + p > n:
                break
            sum_before += p
        assert page.inner_text("#drawn").endswith(f"→ {token}")
        assert page.locator("#bars .chosen").get_attribute("data-token") == token
    text = page.input_value("#text")
    set_range(page, "#n", 0.0)
    likeliest = page.locator("#bars [data-token]").first.get_attribute("data-token")
    page.click("#add")
    wait_until(lambda: page.input_value("#text") == text + likeliest)


def test_the_table_has_the_numbers_of_sample_py(visit, capsys):
    page = visit()
    sample.main([f"--ckpt={BUNDLED}", "--score=katharina", "--json", "--device=cpu", "--dtype=float32"])
    want = json.loads(capsys.readouterr().out)
    page.locator("#score-text").scroll_into_view_if_needed()
    page.fill("#score-text", "katharina")
    wait_until(lambda: page.locator("#scores tbody tr").count() == 10)
    assert page.inner_text("#mean-loss") == f"{want['mean_loss']:.4f}"
    rows = [row.locator("th, td").all_inner_texts() for row in page.locator("#scores tbody tr").all()]
    for row, expected in zip(rows, want["rows"], strict=True):
        context, token, p, loss, *_ = (cell.strip() for cell in row)
        assert (context, token) == (expected["context"], expected["token"])
        assert p == f"{expected['probability']:.4f}" and loss == f"{expected['loss']:.3f}"
    assert page.locator("#scores td.target").count() == 10  # one framed cell in each row


def test_a_mistake_is_shown_where_it_was_made(visit):
    page = visit(expected=["400"])
    page.fill("#text", "an4")
    page.wait_for_selector("#token .message:not([hidden])")
    want = "The model has no token for “4”. It knows a–z: type small letters."
    assert page.inner_text("#token .message") == want
    page.fill("#text", "an")
    page.wait_for_selector("#token .message", state="hidden")
    page.fill("#score-text", "Ann")
    page.wait_for_selector("#table .message:not([hidden])")
    page.fill("#score-text", "")
    page.wait_for_selector("#table .message", state="hidden")
    page.click("#open-new")
    page.fill("#dial-n_embd", "15")
    page.click("#start")
    page.wait_for_selector("#form-error:not([hidden])")
    assert page.inner_text("#form-error") == "n_embd=15 is not divisible by n_head=4"


def test_hostile_text_stays_text(visit):
    page = visit(expected=["400"])
    hostile = {"texts": [{"text": HOSTILE, "is_new": True}] * 12}
    page.route("**/api/samples", lambda route: route.fulfill(json=hostile))
    show(page, HOSTILE)
    assert page.locator("#texts li").first.inner_text().startswith(HOSTILE)
    page.click("#open-new")
    for selector in ("#text", "#score-text", "#prompt"):
        page.fill(selector, HOSTILE)
    page.wait_for_selector("#token .message:not([hidden])")
    page.wait_for_timeout(300)
    assert HOSTILE in page.inner_text("#status")
    assert HOSTILE in page.locator("#run").inner_text()
    assert page.evaluate("window.harm") is None
    assert page.locator("img").count() == 1  # the feather


# ---------------------------------------------------------------- training


def test_the_loss_of_thirty_steps_moves(visit, trained):
    page = visit(trained)
    run = page.evaluate("async () => (await import('/static/store.js')).view.run")
    assert run["curve"]["step"] == list(range(1, 31))
    assert page.get_attribute("#curve", "data-points") == "30"
    losses = [evaluation["val_loss"] for evaluation in run["evaluations"]]
    assert [evaluation["step"] for evaluation in run["evaluations"]] == list(range(3, 31, 3))
    assert losses[-1] < losses[0] - 0.1 and losses[0] < math.log(27) + 0.1
    assert f"validation {losses[-1]:.3f}" in page.inner_text("#legend")


def test_the_slider_moves_every_panel(visit, trained):
    page = visit(trained)
    newest = bars(page), page.locator("#texts li").all_inner_texts()
    page.focus("#moment")
    page.keyboard.press("Home")
    wait_until(lambda: page.inner_text("#when").startswith("Step 0 of 30"))
    wait_until(lambda: max(bars(page).values()) < max(newest[0].values()))  # at step 0 it knows nothing
    wait_until(lambda: page.locator("#texts li").all_inner_texts() != newest[1])
    page.click("#newest")
    wait_until(lambda: page.locator("#texts li").all_inner_texts() == newest[1])
    assert bars(page) == newest[0]


def test_two_runs_side_by_side(visit, trained):
    page = visit(trained)
    page.select_option("#pinned", HOSTILE)
    page.wait_for_selector("#pinned-texts li")
    assert page.inner_text("#pinned-of") == HOSTILE
    page.wait_for_selector("#bars .ink.second", state="attached")
    assert page.locator("#bars .ink.second").count() == page.locator("#bars [data-token]").count()


def test_parts_and_their_numbers(visit, trained):
    page = visit(trained)
    page.locator("#network").scroll_into_view_if_needed()
    page.click("[data-matrix='transformer.h.0.mlp.c_fc.weight']")
    wait_until(lambda: "64 × 16" in page.inner_text("#heat-key"))
    assert page.input_value("#matrix") == "transformer.h.0.mlp.c_fc.weight"
    assert page.inner_text("#histogram-key").startswith("1,024 numbers from")
    shown = [row.split() for row in page.locator("#parts button").all_inner_texts()]
    assert sum(int(row[-1].replace(",", "")) for row in shown) == 4192


def test_export_as_config(visit, trained):
    page = visit(trained)
    page.click("#open-new")
    page.click("#export")
    page.wait_for_selector("#exported:not([hidden])")
    names = {}
    exec(page.inner_text("#exported"), names)  # the file that the page offers is Python
    assert (names["max_iters"], names["dataset"], names["n_embd"]) == (30, "names", 16)


def test_a_lesson_asks_for_a_guess_first(visit, trained):
    """A lesson takes minutes, so another run stands in for it."""
    page, asked = visit(), []
    run = page.evaluate(f"async () => (await import('/static/api.js')).ask('/api/run?name={trained}')")

    def stand_in(route):
        asked.append(json.loads(route.request.post_data))
        route.fulfill(json=run)

    page.route("**/api/start", stand_in)
    page.click("#open-lessons")
    page.locator("#lesson-list summary").first.click()
    page.click("#lesson-list form button >> nth=0")
    assert page.inner_text("#result-0") == ""  # the guess is required
    page.fill("#guess-0", "3.2")
    page.click("#lesson-list form button >> nth=0")
    wait_until(lambda: page.inner_text("#result-0").startswith("Your guess 3.20, this run "))
    loss = run["evaluations"][-1]["val_loss"]
    result = f"Your guess 3.20, this run {loss:.3f}, measured before 2.483. Off by {3.2 - loss:.2f}."
    assert page.inner_text("#result-0") == result
    page.reload()
    wait_until(lambda: page.text_content("#result-0") == result)
    assert [question["config"] for question in asked] == ["config/ladder/0_bigram.py"]


def test_train_starts_what_is_shown(visit, trained):
    """What the closed form says does not count. Another run stands in for the new one."""
    page, asked = visit(), []
    run = page.evaluate(f"async () => (await import('/static/api.js')).ask('/api/run?name={trained}')")
    page.route("**/api/start", lambda route: (asked.append(route.request.post_data_json), route.fulfill(json=run)))
    page.click("#open-new")
    page.select_option("#config", "config/names.py")
    page.click("#open-new")
    page.click("#train")
    wait_until(lambda: page.input_value("#run") == trained)
    page.click("#train")
    wait_until(lambda: len(asked) == 2)
    assert (asked[0]["config"], asked[0]["run"]) == ("config/microgpt.py", None)
    assert asked[0]["options"]["dataset"] == "names"
    assert (asked[1]["config"], asked[1]["run"], asked[1]["options"]) == (None, trained, {})


def test_a_run_that_is_deleted(visit, served):
    folder = served.folder / "out" / "gone"
    folder.mkdir()
    shutil.copy(BUNDLED, folder / "last.pt")
    page = visit("gone", expected=["404", "ERR_INCOMPLETE_CHUNKED"])
    shutil.rmtree(folder)
    wait_until(lambda: "was deleted" in page.inner_text("#status"))
    page.wait_for_selector("#train:disabled")
    assert page.eval_on_selector("#run", "list => list.selectedOptions[0].text") == "gone (deleted)"
    show(page, "bundled")
    wait_until(lambda: page.inner_text("#status").startswith("microgpt, trained: ready"))
    assert page.is_enabled("#train") and "gone" not in page.inner_text("#run")


def test_a_lesson_without_its_data(visit, served):
    """As on a machine without a network: the run ended before its first step."""
    folder = served.folder / "out" / "play" / "lesson" / "page"
    folder.mkdir(parents=True)
    (folder / "command.json").write_text("{}", encoding="utf-8")
    line = "train.py: https://x.org/input.txt: [Errno -2] Name or service not known; download it by hand, then …\n"
    (folder / "log.txt").write_text(line, encoding="utf-8")
    page = visit()
    run = page.evaluate("async () => (await import('/static/api.js')).ask('/api/run?name=play/lesson')")
    page.route("**/api/start", lambda route: route.fulfill(json=run))
    page.click("#open-lessons")
    page.locator("#lesson-list summary").first.click()
    page.fill("#guess-0", "3.2")
    page.click("#lesson-list form button >> nth=0")
    reason = "failed: the data could not be downloaded (Name or service not known)"
    wait_until(lambda: page.inner_text("#result-0") == f"The training {reason}.")
    assert page.inner_text("#status").strip() == f"play/lesson: {reason}"
    assert page.is_hidden("#bars") and page.is_hidden("#texts")  # no numbers of the run before


def test_a_run_that_was_killed(visit, served, trained):
    folder = served.folder / "out" / "killed"
    shutil.copytree(served.folder / "out" / trained, folder)
    path = folder / "page" / "state.json"
    state = json.loads(path.read_text(encoding="utf-8")) | {"status": "running", "step": 20}
    path.write_text(json.dumps(state), encoding="utf-8")
    (folder / "page" / "log.txt").write_text("step 20/30: loss 2.5000\n", encoding="utf-8")
    page = visit("killed")
    want = "killed: stopped unexpectedly at step 20. Train goes on from its last checkpoint."
    assert page.inner_text("#status").strip() == want


def test_reload_and_back_keep_the_run_and_the_texts(visit, trained):
    page = visit(trained)
    page.fill("#text", "mar")
    page.reload()
    wait_until(lambda: page.locator("#ids li").count() == 4)
    assert (page.input_value("#run"), page.input_value("#text")) == (trained, "mar")
    show(page, "bundled")
    page.go_back()
    wait_until(lambda: page.get_attribute("#main", "data-shown") == trained)
    page.go_forward()
    wait_until(lambda: page.get_attribute("#main", "data-shown") == "bundled")


def test_one_step_is_a_point_of_the_curve(visit):
    page = visit()
    page.evaluate(
        """async () => {
          const { change, view } = await import('/static/store.js');
          change({ run: { ...view.run, curve: { step: [1], loss: [3.2], gradient_norm: [1], lr: [0.01] } } });
        }"""
    )
    page.locator("#curve").scroll_into_view_if_needed()
    page.wait_for_timeout(200)
    blue = page.evaluate(
        """() => {
          const canvas = document.querySelector('#curve canvas'), found = [];
          const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
          for (let i = 0; i < data.length; i += 4)
            if (data[i] === 0x1d && data[i + 1] === 0x5f && data[i + 2] === 0xae)
              found.push(((i / 4) % canvas.width) / canvas.width);
          return found;
        }"""
    )
    assert len(blue) > 12 and min(blue) > 0.08 and max(blue) < 0.18  # one of ten steps


def test_automatic_rounds_leave_the_machine_to_training(visit):
    """At least half a second apart, and 20 times as long as the last took."""
    page = visit()
    gaps = page.evaluate(
        """async () => {
          const { gently } = await import('/static/api.js');
          const wait = milliseconds => new Promise(done => setTimeout(done, milliseconds));
          const measure = async took => {
            const times = [];
            const ask = gently(async () => { times.push(performance.now()); await wait(took); });
            while (times.length < 3) { ask(); await wait(10); }
            return times[2] - times[1];
          };
          return [await measure(1), await measure(60)];
        }"""
    )
    assert 500 <= gaps[0] < 1000 and gaps[1] >= 20 * 60


def test_pause_one_step_and_a_server_that_dies(visit, served):
    page = visit(
        expected=[
            "ERR_CONNECTION_REFUSED",
            "ERR_INCOMPLETE_CHUNKED",
            "403",
            "ERR_EMPTY_RESPONSE",
            "ERR_CONNECTION_RESET",
        ]
    )
    run = start_run(page, max_iters=1_000_000)
    wait_until(lambda: "tokens" in page.inner_text("#counts") and "Step 0 " not in page.inner_text("#when"))
    served.kill()
    wait_until(lambda: "does not answer" in page.inner_text("#status"))
    at = state_of(served, run)["step"]
    wait_until(lambda: state_of(served, run)["step"] > at)  # the run goes on by itself
    served.start()
    wait_until(lambda: "new address" in page.inner_text("#status"))
    page.goto(served.address)
    page.wait_for_selector("#bars [data-token]")
    show(page, run)
    page.click("#train")  # pause
    wait_until(lambda: "paused" in page.inner_text("#status"))
    paused = state_of(served, run)["step"]
    assert paused > at
    page.click("#step")
    wait_until(lambda: state_of(served, run)["step"] == paused + 1)
    wait_until(lambda: "waiting" in page.inner_text("#status"))
    began = time.monotonic()
    page.click("#step")
    wait_until(lambda: state_of(served, run)["step"] == paused + 2)
    assert time.monotonic() - began < 2  # no process was started for it
    wait_until(lambda: f"Step {paused + 2:,} of 1,000,000" in page.inner_text("#when"))
    page.evaluate("for (let i = 0; i < 5; i++) document.getElementById('step').click()")
    wait_until(lambda: state_of(served, run)["step"] == paused + 7)
    page.click("#train")  # go on
    wait_until(lambda: state_of(served, run)["step"] > paused + 7)
    wait_until(lambda: page.inner_text("#train").endswith("Pause"))
    page.click("#train")
    wait_until(lambda: "paused" in page.inner_text("#status"))


# ---------------------------------------------------------------- for everybody

CONTRAST = """() => {
  const parse = text => (text.match(/[\\d.]+/g) || [0, 0, 0]).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(c => c / 255)
    .map(c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = node => {
    for (; node; node = node.parentElement) {
      const colour = parse(getComputedStyle(node).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].some(child => child.nodeType === 3 && child.textContent.trim());
    if (!own || !node.checkVisibility() || node.closest(":disabled, .hidden, .pending")) continue;
    const style = getComputedStyle(node);
    const [a, b] = [light(parse(style.color)), light(behind(node))].sort((x, y) => y - x);
    found.push([(a + 0.05) / (b + 0.05), node.tagName + "." + node.className + " " + node.textContent.slice(0, 30)]);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_of_every_text(visit, scheme, trained):
    page = visit(trained, color_scheme=scheme)
    page.click("#open-new")
    page.click("#open-lessons")
    scroll_through(page)
    found = page.evaluate(CONTRAST)
    assert len(found) > 100
    assert [(round(contrast, 2), what) for contrast, what in found if contrast < 4.5] == []


def scroll_through(page):
    """Look at every panel, and return to the top."""
    for panel in ("loss", "table", "network", "weights"):
        page.locator(f"#{panel}").scroll_into_view_if_needed()
        page.wait_for_timeout(150)
    page.wait_for_selector("#parts button")
    page.wait_for_selector("#scores td")
    wait_until(lambda: page.inner_text("#histogram-key"))
    page.evaluate("scrollTo(0, 0)")


@pytest.mark.parametrize("width", [360, 820, 1280])
def test_nothing_scrolls_sideways(visit, width, trained):
    page = visit(trained, viewport={"width": width, "height": 740})
    page.click("#open-new")
    page.click("#open-lessons")
    scroll_through(page)
    for details in page.locator("details:visible").all():
        details.evaluate("node => node.open = true")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_every_control_is_reached_and_named(visit, trained):
    page = visit(trained)
    page.click("#open-new")
    scroll_through(page)
    selector = "button, input, select, textarea, summary, a[href], [tabindex='0']"
    wanted = page.eval_on_selector_all(
        selector,
        "nodes => nodes.filter(n => n.checkVisibility() && !n.disabled)"
        ".map((n, i) => (n.dataset.order = i, n.id || n.tagName))",
    )
    page.evaluate("document.activeElement.blur()")
    reached, hidden = set(), 0
    for _ in range(len(wanted) + 5):
        page.keyboard.press("Tab")
        order, outline = page.evaluate(
            "[document.activeElement.dataset.order, parseFloat(getComputedStyle(document.activeElement).outlineWidth)]"
        )
        reached.add(order)
        hidden += order is not None and outline < 2
    assert [what for i, what in enumerate(wanted) if str(i) not in reached] == []
    assert len(wanted) > 40 and hidden == 0  # the focus is visible on each
    session = page.context.new_cdp_session(page)
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    focusable = [
        node
        for node in nodes
        if not node["ignored"]
        and any(one["name"] == "focusable" and one["value"]["value"] for one in node.get("properties", []))
        and node["role"]["value"] not in ("RootWebArea", "MenuListPopup", "option", "MenuListOption")
    ]
    nameless = [node["role"]["value"] for node in focusable if not node.get("name", {}).get("value", "").strip()]
    assert len(focusable) > 40 and nameless == []
    levels = page.eval_on_selector_all(
        "h1, h2, h3", "nodes => nodes.filter(n => n.checkVisibility()).map(n => Number(n.tagName[1]))"
    )
    assert levels[0] == 1 and all(after - before <= 1 for before, after in pairwise(levels))


@pytest.mark.skipif("QUILL_SCREENSHOTS" not in os.environ, reason="QUILL_SCREENSHOTS is not set to a folder")
def test_screenshots(visit):
    """play.png: half-way through a run of 400 steps. play-dark.png: the page as it opens."""
    folder = Path(os.environ["QUILL_SCREENSHOTS"])
    page = visit(viewport={"width": 1280, "height": 1170})
    start_run(page, max_iters=400, batch_size=16)
    wait_until(lambda: "finished" in page.inner_text("#status"), 90)
    set_range(page, "#moment", 24)
    page.wait_for_timeout(1500)
    page.screenshot(path=folder / "play.png")
    page = visit(color_scheme="dark")
    page.wait_for_selector("#texts .made")
    page.wait_for_timeout(500)
    page.screenshot(path=folder / "play-dark.png")
    assert max((folder / name).stat().st_size for name in ("play.png", "play-dark.png")) < 250_000
