"""The page of a trace: what is packed into it, and what a real browser makes of it."""

import base64
import collections
import dataclasses
import gzip
import json
import pathlib
import re
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trace_samples import distinct, make_trace

from moejax.errors import InputError
from moejax.traces import view as trace_view
from moejax.traces.trace import Outcome, Phase

HOSTILE = "</script><img src=x onerror=alert(1)><!-- {{data}} \u2028 &amp;"
HITS = {Outcome.HIT, Outcome.PREFETCHED, Outcome.SUBSTITUTE}
KNOWN = {*Outcome} - {Outcome.UNKNOWN}
MOVED = {Outcome.MISS, Outcome.PREFETCHED}
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update --force-device-scale-factor=1"
)


def unpacked(page):
    """Header and arrays of a written page, read by the layout that its script reads."""
    [text] = re.findall(r'id="data">([^<]*)</script>', page)
    data = gzip.decompress(base64.b64decode(text))
    length = int.from_bytes(data[:4], "little")
    header = json.loads(data[4 : 4 + length])
    arrays = {}
    for name, (kind, offset, size) in header["arrays"].items():
        assert offset % 8 == 0 and offset >= 4 + length
        arrays[name] = np.frombuffer(data, f"<{kind}", size, offset)
    return header, arrays


@given(st.integers(1, 9), st.integers(1, 4), st.integers(2, 9), st.integers(0, 99))
def test_the_page_holds_the_trace(tmp_path_factory, passes, layers, experts, seed):
    trace = make_trace(passes, layers, experts, seed=seed, outcomes=seed % 2 == 0)
    path = tmp_path_factory.mktemp("page") / "trace.html"
    trace_view.write_page(trace, path, text_of=str)
    header, arrays = unpacked(path.read_text())
    sizes = [header[name] for name in ("rows", "passes", "layers", "experts", "top")]
    assert sizes == [trace.rows, passes, layers, experts, 2]
    for name, array in arrays.items():
        if name == "weights":
            weights = header["weightLow"] + array * header["weightStep"]
            spread = float(np.ptp(trace.weights))
            np.testing.assert_allclose(weights, trace.weights.ravel(), atol=spread / 65535 + 1e-7)
        else:
            np.testing.assert_array_equal(array, getattr(trace, name).ravel())
    needed = {"sequence", "position", "run", "token", "phase", "accepted", "picks", "seconds"}
    assert needed <= set(arrays) and ("outcome" in arrays) == (trace.outcome is not None)
    assert set(header["texts"]) == {str(n) for n in set(trace.token.tolist()) - {-1}}


def test_what_cannot_be_a_page(tmp_path, monkeypatch):
    trace, path = make_trace(4), tmp_path / "trace.html"
    wrong = [trace.outcome[:-1], trace.outcome.astype(int), trace.outcome + np.uint8(9)]
    for outcome in wrong:
        with pytest.raises(InputError, match="outcomes must be"):
            trace_view.write_page(trace, path, outcome=outcome)
    with pytest.raises(InputError, match="cannot write"):
        trace_view.write_page(trace, tmp_path / "none" / "trace.html")
    monkeypatch.setattr(trace_view, "MOST_PICKS", 10)
    with pytest.raises(InputError, match="up to 10 picks"):
        trace_view.write_page(trace, path)
    assert not [*tmp_path.iterdir()]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A headless Chromium, driven by chromedriver."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not program or not driver:
        pytest.skip("chromium and chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    profile = tmp_path_factory.mktemp("profile")
    for flag in [*FLAGS.split(), "--window-size=1280,900", f"--user-data-dir={profile}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield started
    started.quit()


class Opened:
    """An open page and what a person does with it."""

    def __init__(self, browser, trace, path, **options):
        trace_view.write_page(trace, path, **options)
        self.browser, self.trace = browser, trace
        browser.get(path.as_uri())
        self.until("return document.documentElement.dataset.ready === 'yes'")
        self.settle()

    def run(self, script, *arguments):
        return self.browser.execute_script(script, *arguments)

    def until(self, script):
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.browser, 20, 0.02).until(lambda browser: browser.execute_script(script))

    def settle(self):
        """Wait until what was asked for is drawn."""
        self.browser.execute_async_script(
            "const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(done))"
        )

    @property
    def state(self):
        self.settle()
        return self.run("return routingTrace.state()")

    def text(self, selector):
        return self.run("return document.querySelector(arguments[0]).textContent", selector)

    def texts(self, selector):
        script = "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)"
        return self.run(script, selector)

    def counts(self):
        """The legend: distinct experts of passes and layers by outcome."""
        script = (
            "return [...document.querySelectorAll('#legend [data-kind]')]"
            ".map((e) => [e.dataset.kind, Number(e.dataset.count)])"
        )
        return dict(self.run(script))

    def mouse(self, column, layer, do, *arguments):
        """An action at the middle of a cell of the matrix."""
        from selenium.webdriver import ActionChains

        canvas, state = self.browser.find_element("id", "matrix"), self.state
        size = canvas.size
        x = state["gutter"] + (column + 0.5 - state["first"]) / state["span"] * state["width"]
        y = state["strip"] + (layer + 0.5) * state["high"]
        chain = ActionChains(self.browser, duration=0)
        chain.move_to_element_with_offset(canvas, x - size["width"] // 2, y - size["height"] // 2)
        getattr(chain, do)(*arguments)
        return chain

    def click(self, column, layer):
        self.mouse(column, layer, "click").perform()
        return self.state["selected"]

    def keys(self, *keys):
        self.browser.find_element("id", "matrix").send_keys(*keys)
        return self.state

    def choose(self, name, value):
        from selenium.webdriver.support.ui import Select

        Select(self.browser.find_element("id", name)).select_by_value(str(value))
        return self.state

    def pixel(self, column, layer):
        """The colour in the middle of a cell as [red, green, blue]."""
        state = self.state
        x = state["gutter"] + (column + 0.5 - state["first"]) / state["span"] * state["width"]
        y = state["strip"] + (layer + 0.5) * state["high"]
        script = (
            "const canvas = document.createElement('canvas');"
            "canvas.width = canvas.height = 1;"
            "const context = canvas.getContext('2d');"
            "const [x, y] = [...arguments].map(Math.round);"
            "context.drawImage(document.getElementById('matrix'), x, y, 1, 1, 0, 0, 1, 1);"
            "return [...context.getImageData(0, 0, 1, 1).data]"
        )
        return self.run(script, x, y)[:3]

    def colour(self, name):
        """A colour of the style sheet as [red, green, blue]."""
        script = "return getComputedStyle(document.documentElement).getPropertyValue(arguments[0])"
        return [*bytes.fromhex(self.run(script, f"--c-{name}").strip().removeprefix("#"))]

    def quiet(self):
        """Nothing was logged, loaded or injected."""
        assert self.browser.get_log("browser") == []
        assert self.run("return performance.getEntriesByType('resource').length") == 0
        assert self.run("return document.querySelectorAll('img, iframe, [onerror]').length") == 0
        assert self.run("return document.scripts.length") == 2
        return True


def columns_of(trace, chosen=None, by="pass"):
    """The chosen rows of each column that has any."""
    rows = np.arange(trace.rows) if chosen is None else np.flatnonzero(chosen)
    if by == "token":
        return [[row] for row in rows]
    groups = collections.defaultdict(list)
    for row in rows:
        groups[trace.run[row]].append(row)
    return list(groups.values())


def legend(trace, columns):
    """Distinct experts of columns and layers by outcome, those that there are."""
    counts = {
        outcome.name.lower().replace("unknown", ""): sum(
            distinct(trace, rows, layer, {outcome})
            for rows in columns
            for layer in range(trace.layers)
        )
        for outcome in Outcome
    }
    return {name: count for name, count in counts.items() if count}


def curves(trace, columns, window):
    """Hit rate and bytes per column, over the window before each; drafts beside others are out."""
    drafted = [trace.phase[rows[0]] == Phase.DRAFT for rows in columns]
    sums = [
        [
            sum(distinct(trace, rows, layer, kinds) for layer in range(trace.layers))
            for kinds in (HITS, KNOWN, MOVED)
        ]
        if all(drafted) or not draft
        else [0, 0, 0]
        for rows, draft in zip(columns, drafted, strict=True)
    ]
    rates, moved = [], []
    for last in range(len(columns)):
        hits, needed, records = np.sum(sums[max(0, last + 1 - window) : last + 1], axis=0)
        rates.append(hits / needed if needed else None)
        moved.append(1000 * records / min(window, last + 1))
    return rates, moved


def same_curves(state, expected):
    for curve, values in zip(state["curves"], expected, strict=True):
        np.testing.assert_allclose(
            np.array(curve["values"], float), np.array(values, float), rtol=1e-9
        )


def test_a_cell_tells_what_happened_in_it(browser, tmp_path):
    about = {"policy": HOSTILE, "record_bytes": 1000}
    trace = make_trace(model=HOSTILE, about=about)
    page = Opened(browser, trace, tmp_path / "t.html", text_of=lambda n: f"{HOSTILE}\n{n}")
    assert page.text("h1") == HOSTILE and HOSTILE in page.text("#summary")
    assert page.state["columns"] == 40 and page.counts() == legend(trace, columns_of(trace))
    same_curves(page.state, curves(trace, columns_of(trace), 1))
    rejected = trace.run[~trace.accepted][0]
    for number, layer in [(3, 1), (39, 2), (int(rejected), 0)]:
        assert page.click(number, layer) == {"pass": number, "column": number, "layer": layer}
        assert page.text("#details h2") == f"Pass {number} · layer {layer}"
        rows = range(trace.rows)[trace.rows_of(number)]
        heads, cells = page.texts("#details h3"), page.texts("#details .picks td")
        expected = []
        for row, head in zip(rows, heads, strict=True):
            token = trace.token[row]
            text = json.dumps(f"{HOSTILE}\n{token}", ensure_ascii=False)
            assert head.removesuffix(" rejected draft") == (text if token >= 0 else "unknown token")
            assert head.endswith(" rejected draft") == (not trace.accepted[row])
            for k in range(trace.top_k):
                if trace.picks[row, layer, k] >= 0:
                    weight = f"{trace.weights[row, layer, k]:.3f}"
                    expected.append([str(trace.picks[row, layer, k]), weight])
        assert len(cells) == 3 * len(expected)
        assert [cells[i] for i in range(0, len(cells), 3)] == [e for e, _ in expected]
        weights = [float(cells[i]) for i in range(1, len(cells), 3)]
        np.testing.assert_allclose(weights, [float(w) for _, w in expected], atol=0.0011)
        counts = [distinct(trace, rows, layer, {o}) for o in Outcome if o in KNOWN]
        words = [int(n) for n in re.findall(r"(\d+) [a-z]", page.text("#details .cell"))]
        assert words == [len(rows), *filter(None, counts)]
        assert f"pass {number} · layer {layer}" in page.text("#readout")
    row, layer, _ = np.argwhere(trace.outcome == Outcome.SUBSTITUTE)[0]
    page.click(int(trace.run[row]), int(layer))
    lost = {*trace.exact[row, layer].tolist()} - {*trace.picks[row, layer].tolist(), -1}
    if lost:
        assert any(str(lost.pop()) in text for text in page.texts("#details .lost"))
    assert page.quiet()


def test_zoom_and_pan(browser, tmp_path):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.actions.wheel_input import ScrollOrigin
    from selenium.webdriver.common.keys import Keys

    page = Opened(browser, make_trace(400), tmp_path / "t.html")
    state = page.state
    assert (state["first"], state["span"]) == (0, 400)
    canvas = browser.find_element("id", "matrix")
    middle = canvas.size["width"] // 2
    chain = ActionChains(browser, duration=0)
    origin = ScrollOrigin.from_element(canvas, 300 - middle, 0)
    chain.scroll_from_origin(origin, 0, -300).perform()

    def under(state, x):
        return state["first"] + (x - state["gutter"]) / state["width"] * state["span"]

    zoomed = page.state
    assert zoomed["span"] < 250 and abs(under(zoomed, 300) - under(state, 300)) < 1
    page.mouse(int(under(zoomed, 500)), 1, "click_and_hold").move_by_offset(
        -200, 5
    ).release().perform()
    dragged = page.state
    moved = 200 / dragged["width"] * dragged["span"]
    assert abs(dragged["first"] - zoomed["first"] - moved) < 0.5 and dragged["selected"] is None
    assert page.keys("0")["span"] == 400
    assert page.keys(Keys.ARROW_RIGHT)["selected"] == {"pass": 0, "column": 0, "layer": 0}
    assert page.keys(Keys.ARROW_RIGHT, Keys.ARROW_DOWN)["selected"]["layer"] == 1
    closer = page.keys("+", "+", "+", "+")
    assert closer["span"] == 25 and closer["first"] == pytest.approx(1.5 - 1.5 / 16)
    at_end = page.keys(Keys.END, Keys.ARROW_DOWN, Keys.ARROW_DOWN)
    assert at_end["selected"] == {"pass": 399, "column": 399, "layer": 2}
    assert at_end["first"] + at_end["span"] == 400
    assert page.keys(Keys.PAGE_UP)["first"] == pytest.approx(375 - 22.5)
    assert page.keys("-")["span"] == 50 and page.keys(Keys.ESCAPE)["selected"] is None
    browser.find_element("id", "fit").click()
    assert page.state["span"] == 400 and page.quiet()


def test_filters(browser, tmp_path):
    trace = make_trace(90, seed=5)
    page = Opened(browser, trace, tmp_path / "t.html")
    assert "Nothing" in page.text("#readout")
    same_curves(page.choose("window", 8), curves(trace, columns_of(trace), 8))
    page.click(50, 1)
    kept = trace.phase[trace.rows_of(50)][0]
    for phase in Phase:
        if phase != kept:
            browser.find_element("id", f"phase-{phase.name.lower()}").click()
    columns = columns_of(trace, trace.phase == kept)
    state = page.state
    assert state["columns"] == len(columns) and state["selected"]["pass"] == 50
    assert page.counts() == legend(trace, columns)
    same_curves(state, curves(trace, columns, 8))
    page.choose("sequence", trace.sequence[trace.rows_of(50)][0])
    chosen = (trace.phase == kept) & (trace.sequence == trace.sequence[trace.rows_of(50)][0])
    for by in ("pass", "token"):
        columns = columns_of(trace, chosen, by)
        state = page.choose("columns", by)
        assert state["columns"] == len(columns) and page.counts() == legend(trace, columns)
        same_curves(state, curves(trace, columns, 8))
    browser.find_element("id", f"phase-{Phase(kept).name.lower()}").click()
    assert page.state["columns"] == 0 and page.state["selected"] is None and page.quiet()


def test_moved_records_are_those_that_the_run_counted(browser, tmp_path):
    rng = np.random.default_rng(0)
    counts = {n: rng.integers(0, 9, (40, 3)).astype(np.int32) for n in ("fetched", "prefetched")}
    trace = make_trace(40, counts=counts)
    page = Opened(browser, trace, tmp_path / "t.html")
    moved = 1000 * sum(count.sum(axis=1) for count in counts.values())
    assert page.state["curves"][1]["values"] == moved.tolist()
    page.choose("columns", "token")  # a pass's counts are not those of one of its tokens
    same_curves(page.state, curves(trace, columns_of(trace, by="token"), 1))
    trace_view.write_page(trace, tmp_path / "u.html", outcome=trace.outcome, outcome_of="LRU")
    header, arrays = unpacked((tmp_path / "u.html").read_text())
    assert "moved" not in arrays and "LRU" in header["outcomes"]


def test_colours(browser, tmp_path):
    rows = 24
    outcome = np.repeat(np.arange(rows) % 7, 4).reshape(rows, 2, 2).astype(np.uint8)
    outcome[:, 1] = Outcome.HIT
    outcome[:, 1, 1] = outcome[:, 0, 1]
    fixed = np.broadcast_to(np.arange(2, dtype=np.int16), outcome.shape)
    trace = make_trace(rows, layers=2)
    trace = dataclasses.replace(trace, phase=np.full(trace.rows, Phase.DECODE, np.uint8))
    first = np.searchsorted(trace.run, np.arange(rows))
    columns = {n: c[first] for n, c in trace.columns().items() if len(c) == trace.rows}
    columns |= {"outcome": outcome, "picks": fixed.copy(), "exact": None}
    trace = dataclasses.replace(trace, **columns).check()
    page = Opened(browser, trace, tmp_path / "t.html")
    for dark in (False, True):
        wanted = "dark" if dark else "light"
        while page.text("#theme") != f"Theme: {wanted}":
            browser.find_element("id", "theme").click()
        for code, name in enumerate(o.name.lower() for o in Outcome):
            assert page.pixel(code, 0) == page.colour(name)
        page.keys("0")
    assert page.state["width"] / page.state["span"] > 14
    # Where cells are too narrow for shares, half of a cell's experts make half of its colour.
    browser.set_window_size(330, 700)
    hit, miss = np.array(page.colour("hit")), np.array(page.colour("miss"))
    assert page.state["width"] / page.state["span"] < 14
    assert page.pixel(2, 0) == page.colour("miss")
    np.testing.assert_allclose(page.pixel(2, 1), hit + (miss - hit) * 0.65, atol=1)
    browser.set_window_size(1280, 900)
    assert page.quiet()


def test_drafts_are_apart(browser, tmp_path):
    """Paler than the same experts of a verification, and told; alone they are as all others."""
    trace = make_trace(8, layers=2)
    phase = np.where(trace.run % 2, Phase.VERIFY, Phase.DRAFT).astype(np.uint8)
    missed = np.where(trace.picks < 0, 0, Outcome.MISS).astype(np.uint8)
    trace = dataclasses.replace(trace, phase=phase, outcome=missed, exact=None).check()
    page = Opened(browser, trace, tmp_path / "t.html")
    assert page.texts("#apart") == ["paler, and in no rate: drafts"]
    miss, paper = np.array(page.colour("miss")), 255
    assert page.pixel(1, 0) == page.colour("miss")
    np.testing.assert_allclose(page.pixel(0, 0), miss + (paper - miss) * 0.6, atol=2)
    assert page.state["curves"][0]["values"] == [None, 0] * 4
    browser.find_element("id", "phase-verify").click()
    assert page.texts("#apart") == [] and page.pixel(0, 0) == page.colour("miss")
    assert page.state["curves"][0]["values"] == [0] * 4 and page.quiet()


def reused(trace, row, layer, expert, recent):
    """The name of a use by the passes since the one before it that was no draft's."""
    now = trace.run[row]
    used = (trace.picks[:, layer] == expert).any(axis=1) & (trace.phase != Phase.DRAFT)
    before = trace.run[used & (trace.run < now)]
    if not len(before):
        return "first"
    return "recent" if now - before.max() <= recent else "earlier"


def test_without_outcomes_reuse_is_shown(browser, tmp_path):
    trace = make_trace(30, experts=16, outcomes=False, weights=None, about={})
    page = Opened(browser, trace, tmp_path / "t.html")
    assert "does not say" in page.text("#notice") and page.state["colour"] == "reuse"
    for recent in (8, 1):
        state, expected = page.choose("recent", recent), collections.Counter()
        for rows in columns_of(trace):
            for layer in range(trace.layers):
                experts = {*trace.picks[rows, layer].ravel().tolist()} - {-1}
                expected.update(reused(trace, rows[0], layer, e, recent) for e in experts)
        assert page.counts() == dict(expected)
        assert len(state["curves"][0]["values"]) == 30
    page.click(7, 2)
    assert "weight" not in page.texts("#details th") and page.quiet()


def test_a_damaged_page_says_so(browser, tmp_path):
    path = tmp_path / "t.html"
    trace_view.write_page(make_trace(4), path)
    text = path.read_text()
    middle = text.index('id="data">') + 200
    path.write_text(text[:middle] + text[middle + 80 :])
    browser.get(path.as_uri())
    page = Opened.__new__(Opened)
    page.browser = browser
    page.until("return document.getElementById('summary').textContent.includes('cannot be read')")
    assert browser.get_log("browser")  # and the console, why


def test_the_page_is_in_the_package():
    names = {path.name for path in pathlib.Path(trace_view.SOURCES).iterdir()}
    assert names == {*trace_view.SCRIPTS, "page.html", "page.css"}
