// What the page shows, and what people do to it.
"use strict";

const $ = (id) => document.getElementById(id);
const DRAG_PX = 4; // a pointer that moves less clicks

class Page {
  constructor(data) {
    this.data = data;
    this.view = new View();
    this.selected = null;
    this.hovered = null;
    this.choice = { phases: new Set(data.phase), sequence: -1, by: "pass" };
    this.colour = data.outcome ? "outcome" : "reuse";
    this.recent = 8;
    this.head();
    this.fillControls();
    this.listen();
    this.setTheme("system");
    this.rebuild();
  }

  head() {
    const { data } = this;
    $("title").textContent = data.model;
    document.title = `${data.model}: routing trace`;
    const sizes = [plural(data.rows, "token"), plural(data.passes, "pass")];
    sizes.push(`${data.layers} layers of ${data.experts} experts`, `top ${data.top}`);
    sizes.push(...data.about);
    $("summary").textContent = sizes.join(" · ");
    const notice = data.outcome
      ? data.outcomes
      : "This trace does not say which experts were resident. Colours show how long ago each expert was used instead.";
    $("notice").textContent = notice;
    $("notice").hidden = !notice;
  }

  fillControls() {
    const { data } = this;
    const options = (id, pairs, chosen) => {
      const made = pairs.map(([value, text]) => element("option", { value }, text));
      $(id).replaceChildren(...made);
      $(id).value = chosen;
    };
    for (const phase of [...this.choice.phases].sort()) {
      const box = element("input", { type: "checkbox", id: `phase-${PHASES[phase]}`, value: phase });
      box.checked = true;
      const colour = chip("hit");
      colour.style.background = `var(--p-${PHASES[phase]})`;
      $("phases").append(element("label", {}, box, " ", colour, PHASES[phase]));
    }
    const sequences = [...new Set(data.sequence)].sort((a, b) => a - b);
    options("sequence", [[-1, "all"], ...sequences.map((n) => [n, n])], -1);
    const colours = data.outcome ? [["outcome", "outcomes"]] : [];
    options("colour", [...colours, ["reuse", "reuse"]], this.colour);
    const steps = [1, 2, 4, 8, 16, 32, 64, 128];
    options("recent", steps.map((n) => [n, n]), this.recent);
    options("window", [[1, "single"], ...[8, 32, 128, 512].map((n) => [n, n])], data.passes > 64 ? 32 : 1);
  }

  listen() {
    $("controls").addEventListener("submit", (event) => event.preventDefault());
    $("controls").addEventListener("change", () => {
      const boxes = [...$("phases").querySelectorAll("input:checked")];
      this.choice.phases = new Set(boxes.map((box) => Number(box.value)));
      this.choice.sequence = Number($("sequence").value);
      this.choice.by = $("columns").value;
      this.colour = $("colour").value;
      this.recent = Number($("recent").value);
      this.rebuild();
    });
    const middle = () => (this.selected ? this.selected.column + 0.5 : this.view.first + this.view.span / 2);
    $("in").addEventListener("click", () => this.zoom(0.5, middle()));
    $("out").addEventListener("click", () => this.zoom(2, middle()));
    $("fit").addEventListener("click", () => this.fit());
    $("theme").addEventListener("click", () => {
      this.setTheme({ system: "light", light: "dark", dark: "system" }[this.theme]);
      this.draw();
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
      this.setTheme(this.theme);
      this.draw();
    });
    for (const canvas of [$("matrix"), $("curves")]) this.listenTo(canvas);
    $("matrix").addEventListener("keydown", (event) => this.key(event, middle()));
    new ResizeObserver(() => this.draw()).observe($("chart"));
  }

  listenTo(canvas) {
    const { view } = this;
    const at = (event) => event.clientX - canvas.getBoundingClientRect().left;
    let drag = null;
    canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      const sideways = event.shiftKey ? event.deltaY || event.deltaX : event.deltaX;
      if (event.shiftKey || Math.abs(event.deltaX) > Math.abs(event.deltaY)) {
        view.pan((sideways / view.width) * view.span);
      } else {
        view.zoom(Math.exp(Math.min(Math.max(event.deltaY, -300), 300) * 0.0025), view.column(at(event)));
      }
      this.draw();
    }, { passive: false });
    canvas.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      canvas.setPointerCapture(event.pointerId);
      drag = { x: event.clientX, first: view.first, moved: false };
    });
    canvas.addEventListener("pointermove", (event) => {
      if (drag) {
        const by = event.clientX - drag.x;
        drag.moved ||= Math.abs(by) >= DRAG_PX;
        if (!drag.moved) return;
        canvas.classList.add("dragging");
        view.first = drag.first;
        view.pan((-by / view.width) * view.span);
      } else {
        this.hovered = this.cellAt(canvas, event);
      }
      this.draw();
    });
    const end = (event) => {
      canvas.classList.remove("dragging");
      if (drag && !drag.moved && event.type === "pointerup") this.choose(this.cellAt(canvas, event));
      drag = null;
    };
    canvas.addEventListener("pointerup", end);
    canvas.addEventListener("pointercancel", end);
    canvas.addEventListener("pointerleave", () => {
      this.hovered = null;
      this.draw();
    });
  }

  // The cell under a pointer; in the curves, that of the layer last chosen.
  cellAt(canvas, event) {
    const box = canvas.getBoundingClientRect();
    const column = Math.floor(this.view.column(event.clientX - box.left));
    const inside = canvas.id === "matrix";
    const layer = inside ? Math.floor((event.clientY - box.top - STRIP) / this.high) : this.selected?.layer ?? 0;
    const there = column >= 0 && column < this.table.columns.count && layer >= 0 && layer < this.data.layers;
    return there && event.clientX - box.left >= GUTTER ? { column, layer } : null;
  }

  key(event, middle) {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    const { view } = this;
    const last = this.table.columns.count - 1;
    const moves = {
      ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1],
      Home: [-Infinity, 0], End: [Infinity, 0],
    };
    const others = {
      "+": () => this.zoom(0.5, middle), "=": () => this.zoom(0.5, middle),
      "-": () => this.zoom(2, middle), "0": () => this.fit(),
      PageUp: () => view.pan(-view.span * 0.9), PageDown: () => view.pan(view.span * 0.9),
      Escape: () => this.choose(null),
    };
    if (event.key in moves && last >= 0) {
      const [dx, dy] = moves[event.key];
      const from = this.selected ?? { column: Math.floor(view.first), layer: 0 };
      const column = this.selected || Math.abs(dx) > 1 ? from.column + dx : from.column;
      const layer = this.selected ? from.layer + dy : from.layer;
      this.choose({
        column: Math.min(Math.max(column, 0), last),
        layer: Math.min(Math.max(layer, 0), this.data.layers - 1),
      });
      view.show(this.selected.column);
    } else if (event.key in others) others[event.key]();
    else return;
    event.preventDefault();
    this.draw();
  }

  zoom(factor, around) {
    this.view.zoom(factor, around);
    this.draw();
  }

  fit() {
    this.view.fit();
    this.draw();
  }

  setTheme(theme) {
    this.theme = theme;
    const dark = theme === "dark" || (theme === "system" && matchMedia("(prefers-color-scheme: dark)").matches);
    document.documentElement.dataset.theme = dark ? "dark" : "light";
    document.documentElement.style.colorScheme = dark ? "dark" : "light";
    $("theme").textContent = `Theme: ${theme}`;
    this.palette = readPalette();
  }

  // Columns, codes and sums anew; the chosen row stays chosen if it is still there.
  rebuild() {
    const { data } = this;
    const reusing = this.colour === "reuse";
    const kept = this.selected && this.table.rowsOf(this.selected.column)[0];
    const columns = chooseColumns(data, this.choice);
    const codes = reusing ? reuse(data, this.recent) : data.outcome;
    const before = this.table?.columns.count;
    this.table = new Table(data, columns, codes, reusing ? REUSE : OUTCOMES);
    if (columns.count !== before) this.view.reset(columns.count);
    if (this.selected) {
      const layer = this.selected.layer;
      const column = this.columnOf(kept);
      this.selected = column < 0 ? null : { column, layer };
    }
    this.hovered = null;
    this.setCurves(reusing);
    this.setLegend();
    $("recent-label").hidden = !reusing;
    this.details();
    this.draw();
  }

  // The column whose pass, or whose token, is that of a row; -1 = none.
  columnOf(row) {
    const { data, table } = this;
    for (let c = 0; c < table.columns.count; c++) {
      const rows = table.rowsOf(c);
      if (this.choice.by === "token" ? rows[0] === row : data.run[rows[0]] === data.run[row]) return c;
    }
    return -1;
  }

  setCurves(reusing) {
    const { data, table } = this;
    this.moved = reusing ? null : movedSums(data, table, this.choice);
    const percent = (value) => `${Math.round(value * 100)} %`;
    const rate = reusing
      ? `experts used within ${plural(this.recent, "pass")} before`
      : "hit rate of distinct experts";
    const short = reusing ? "reused" : "hit rate";
    const share = { label: rate, short, above: table.good, below: table.needed, limit: 1, text: percent };
    const per = this.choice.by;
    if (reusing) {
      const label = `distinct experts per ${per}, all layers`;
      const text = (n) => n.toLocaleString("en");
      this.curves = [share, { label, short: "experts", above: table.needed, below: table.own, text }];
      return;
    }
    const size = data.recordBytes;
    const above = size ? this.moved.sums.map((count) => count * size) : this.moved.sums;
    const source = this.moved.counted ? "" : " (misses, and prefetched ones when used)";
    const label = `${size ? "bytes" : "records"} moved per ${per}${source}`;
    const text = size ? inBytes : (n) => n.toLocaleString("en");
    const amount = { label, short: "moved", above, text, binary: Boolean(size) };
    this.curves = [share, amount];
  }

  setLegend() {
    const { table, data } = this;
    const items = [];
    let all = 0;
    const counts = table.kinds.map((_, code) => {
      let sum = 0;
      for (let layer = 0; layer < data.layers; layer++) sum += table.of(code, layer, 0, table.columns.count);
      all += sum;
      return sum;
    });
    table.kinds.forEach((kind, code) => {
      if (!counts[code]) return;
      const share = `${((100 * counts[code]) / all).toFixed(1)} %`;
      const label = kind.name === "recent" ? `used within ${plural(this.recent, "pass")}` : kind.label;
      const marks = { "data-kind": kind.name, "data-count": counts[code] };
      items.push(element("li", marks, chip(kind.name), `${label} (${share})`));
    });
    const counted = `shares of the distinct experts of each ${this.choice.by} and layer`;
    items.push(element("li", { class: "faint" }, counted));
    if (data.accepted.includes(0)) {
      items.push(element("li", {}, rejectedMark(), "under the phases: rejected drafts"));
    }
    if (table.faded) items.push(element("li", { id: "apart" }, "paler, and in no rate: drafts"));
    const rule = "in a cell of several experts the most frequent but a hit, stronger the larger their share";
    items.push(element("li", { class: "faint" }, rule));
    $("legend").replaceChildren(...items);
  }

  choose(cell) {
    this.selected = cell;
    this.details();
    this.draw();
  }

  details() {
    const { selected, table, moved } = this;
    const sums = moved && selected ? moved.sums : null;
    const here = sums ? sums[selected.column + 1] - sums[selected.column] : null;
    showDetails($("details"), this.data, table, selected, here);
  }

  draw() {
    this.asked ??= requestAnimationFrame(() => {
      this.asked = null;
      this.drawNow();
    });
  }

  drawNow() {
    const { view, table, palette, data } = this;
    const [matrix, curves] = [$("matrix"), $("curves")];
    view.width = Math.max(matrix.clientWidth - GUTTER - 2, 10);
    view.clamp();
    const room = Math.max(window.innerHeight - 450, 220);
    this.high = Math.min(Math.max(room / data.layers, 4), 34);
    const layersHigh = this.high * data.layers;
    const context = prepare(matrix, STRIP + layersHigh + AXIS);
    const boxes = [{ top: 18, height: 74 }, { top: 116, height: 74 }];
    const below = prepare(curves, 198);
    if (table.columns.count) {
      drawAxes(context, table, view, data.layers, this.high, palette, this.choice.by);
      clipped(context, view, layersHigh + STRIP + AXIS, () => {
        drawStrip(context, table, view, palette);
        drawCells(context, table, view, data.layers, this.high, palette);
        fadeDrafts(context, table, view, data.layers, this.high, palette);
        drawSelection(context, view, data.layers, this.high, this.selected, palette);
      });
      const size = Number($("window").value);
      this.drawCross(below, view);
      this.curves.forEach((curve, i) => drawCurve(below, view, boxes[i], curve, size, palette));
    } else {
      context.fillStyle = palette.faint;
      context.fillText("Nothing is left: choose another phase or sequence.", GUTTER, STRIP + 20);
    }
    this.read();
  }

  drawCross(context, view) {
    const cell = this.hovered ?? this.selected;
    if (!cell) return;
    const x = view.x(cell.column + 0.5);
    if (x < GUTTER || x > GUTTER + view.width) return;
    context.fillStyle = this.palette.cross;
    context.globalAlpha = 0.5;
    context.fillRect(x - 0.5, 10, 1, 182);
    context.globalAlpha = 1;
  }

  // What is under the pointer or chosen, in a line of text.
  read() {
    const { table } = this;
    const cell = this.hovered ?? this.selected;
    if (!cell || !table.columns.count) {
      $("readout").textContent = "Nothing is selected.";
      return;
    }
    const size = Number($("window").value);
    const { column, layer } = cell;
    const parts = [`pass ${table.pass(column)}`, `layer ${layer}`, inWords(table, table.cell(column, layer))];
    for (const curve of this.curves) {
      const value = curveValue(curve, cell.column, size);
      if (value !== null) parts.push(`${curve.short} ${curve.text(value)}`);
    }
    if (size > 1) parts.push(`both over ${size} columns`);
    const text = parts.join(" · ");
    if ($("readout").textContent !== text) $("readout").textContent = text;
  }

  // What is visible and chosen, for programs.
  state() {
    const { view, table, selected } = this;
    return {
      first: view.first, span: view.span, columns: table.columns.count, width: view.width,
      gutter: GUTTER, strip: STRIP, high: this.high, colour: this.colour,
      selected: selected && { pass: table.pass(selected.column), ...selected },
      curves: this.curves.map((curve) => ({
        label: curve.label,
        values: Array.from({ length: table.columns.count }, (_, c) => curveValue(curve, c, Number($("window").value))),
      })),
    };
  }
}

function clipped(context, view, height, draw) {
  context.save();
  context.beginPath();
  context.rect(GUTTER, 0, view.width + 2, height);
  context.clip();
  draw();
  context.restore();
}

function rejectedMark() {
  const mark = chip("hit");
  mark.style.background = "var(--ink)";
  return mark;
}

function inBytes(count) {
  const power = Math.min(3, Math.floor(Math.log2(Math.max(count, 1)) / 10));
  return `${Number((count / 1024 ** power).toPrecision(3))} ${["B", "KiB", "MiB", "GiB"][power]}`;
}

readData($("data").textContent)
  .then((data) => {
    const page = new Page(data);
    window.routingTrace = { state: () => page.state() };
    document.documentElement.dataset.ready = "yes";
  })
  .catch((error) => {
    $("summary").textContent = `The trace in this page cannot be read: ${error.message}`;
    throw error;
  });
