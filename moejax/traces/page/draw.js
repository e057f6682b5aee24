// The two canvases. The view says which columns are visible; x is shared.
"use strict";

const GUTTER = 52; // px, left of both canvases: names of layers, scales
const STRIP = 14; // px, above the matrix: phases and rejected drafts
const AXIS = 20; // px, below the matrix: numbers of passes
const SHADES = 24;

// Every colour by its name in the style sheet, as CSS text and as red, green and blue.
function readPalette() {
  const style = getComputedStyle(document.documentElement);
  const probe = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const found = {};
  for (const name of ["paper", "panel", "ink", "faint", "line", "cross"]) {
    found[name] = style.getPropertyValue(`--${name}`).trim();
  }
  const codes = [...OUTCOMES, ...REUSE].map((kind) => `c-${kind.name}`);
  for (const name of ["paper", ...codes, ...PHASES.map((phase) => `p-${phase}`)]) {
    probe.fillStyle = style.getPropertyValue(`--${name}`).trim();
    probe.fillRect(0, 0, 1, 1);
    found[name] = probe.fillStyle;
    found[`${name}-rgb`] = probe.getImageData(0, 0, 1, 1).data;
  }
  return found;
}

class View {
  constructor() {
    this.first = 0;
    this.span = 1;
    this.count = 1;
    this.width = 1;
  }
  reset(count) {
    this.count = Math.max(count, 1);
    this.fit();
  }
  fit() {
    this.first = 0;
    this.span = this.count;
  }
  clamp() {
    this.span = Math.min(Math.max(this.span, Math.min(4, this.count)), this.count);
    this.first = Math.min(Math.max(this.first, 0), this.count - this.span);
  }
  zoom(factor, around) {
    const share = (around - this.first) / this.span;
    this.span *= factor;
    this.clamp();
    this.first = around - share * this.span;
    this.clamp();
  }
  pan(columns) {
    this.first += columns;
    this.clamp();
  }
  show(column) {
    if (column < this.first) this.first = column;
    if (column + 1 > this.first + this.span) this.first = column + 1 - this.span;
    this.clamp();
  }
  x(column) {
    return GUTTER + ((column - this.first) / this.span) * this.width;
  }
  column(x) {
    return this.first + ((x - GUTTER) / this.width) * this.span;
  }
  get cell() {
    return this.width / this.span;
  }
}

// Sets a canvas to its size on the screen; a context in CSS pixels, cleared.
function prepare(canvas, height) {
  const ratio = window.devicePixelRatio || 1;
  const width = canvas.clientWidth;
  const [wide, high] = [Math.round(width * ratio), Math.round(height * ratio)];
  if (canvas.width !== wide || canvas.height !== high) {
    canvas.style.height = `${height}px`;
    canvas.width = wide;
    canvas.height = high;
  }
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  context.font = '11px system-ui, "DejaVu Sans", sans-serif';
  return context;
}

// Packed colours [code][shade]: the calm colour of hits, towards the code's own the larger its share.
function shades(kinds, palette) {
  const calm = palette[`c-${kinds.find((kind) => kind.good).name}-rgb`];
  return kinds.map((kind) => {
    const own = palette[`c-${kind.name}-rgb`];
    return Uint32Array.from({ length: SHADES + 1 }, (_, shade) => {
      const part = shade === 0 ? 0 : 0.3 + (0.7 * shade) / SHADES;
      const mixed = [0, 1, 2].map((i) => Math.round(calm[i] + (own[i] - calm[i]) * part));
      return (255 << 24) | (mixed[2] << 16) | (mixed[1] << 8) | mixed[0];
    });
  });
}

// The most frequent code but a plain hit, and its kind's share of the cell; -1 = an empty cell.
function dominant(table, layer, first, last, calm) {
  let [total, best, most, others] = [0, -1, 0, 0];
  for (let code = 0; code < table.kinds.length; code++) {
    const count = table.of(code, layer, first, last);
    total += count;
    if (code === calm) continue;
    others += count;
    if (count > most) [best, most] = [code, count];
  }
  if (total === 0) return [-1, 0];
  return best < 0 ? [calm, 0] : [best, Math.max(1, Math.round((others / total) * SHADES))];
}

// One pixel per cell, or per column of the screen where these are fewer, stretched over the chart.
function drawCells(context, table, view, layers, high, palette) {
  const from = Math.floor(view.first);
  const to = Math.min(Math.ceil(view.first + view.span), table.columns.count);
  const bins = Math.min(to - from, Math.ceil(view.width * (window.devicePixelRatio || 1)));
  const image = new ImageData(bins, layers);
  const pixels = new Uint32Array(image.data.buffer);
  const calm = table.kinds.findIndex((kind) => kind.good);
  const colours = shades(table.kinds, palette);
  for (let bin = 0; bin < bins; bin++) {
    const first = from + Math.floor((bin * (to - from)) / bins);
    const last = Math.max(first + 1, from + Math.floor(((bin + 1) * (to - from)) / bins));
    for (let layer = 0; layer < layers; layer++) {
      const [code, shade] = dominant(table, layer, first, last, calm);
      if (code >= 0) pixels[layer * bins + bin] = colours[code][shade];
    }
  }
  const buffer = document.createElement("canvas");
  [buffer.width, buffer.height] = [bins, layers];
  buffer.getContext("2d").putImageData(image, 0, 0);
  context.imageSmoothingEnabled = false;
  const [left, right] = [view.x(from), view.x(to)];
  context.drawImage(buffer, 0, 0, bins, layers, left, STRIP, right - left, layers * high);
  if (view.cell >= 14 && high >= 8) drawShares(context, table, view, layers, high, palette, from, to);
  context.fillStyle = palette.paper;
  for (let c = from; view.cell >= 5 && c <= to; c++) context.fillRect(view.x(c) - 0.5, STRIP, 1, layers * high);
  for (let l = 0; high >= 5 && l <= layers; l++) context.fillRect(GUTTER, STRIP + l * high - 0.5, view.width, 1);
}

// Cells of drafts are paler: what they ran, the model has yet to run.
function fadeDrafts(context, table, view, layers, high, palette) {
  const step = Math.max(1, view.span / view.width);
  context.fillStyle = palette.paper;
  context.globalAlpha = 0.6;
  for (let at = Math.floor(view.first); at < Math.min(view.first + view.span, table.columns.count); at += step) {
    const column = Math.floor(at);
    const right = view.x(Math.min(Math.ceil(at + step), table.columns.count));
    const left = view.x(column);
    if (table.drafted(column)) context.fillRect(left, STRIP, right - left, layers * high);
  }
  context.globalAlpha = 1;
}

// Cells that are large enough show the share of each code by width.
function drawShares(context, table, view, layers, high, palette, from, to) {
  for (let column = from; column < to; column++) {
    for (let layer = 0; layer < layers; layer++) {
      const counts = table.cell(column, layer);
      const total = counts.reduce((sum, count) => sum + count, 0);
      let x = view.x(column);
      counts.forEach((count, code) => {
        if (!count) return;
        const wide = (count / total) * view.cell;
        context.fillStyle = palette[`c-${table.kinds[code].name}`];
        context.fillRect(x, STRIP + layer * high, wide, high);
        x += wide;
      });
    }
  }
}

// Phases above the matrix, and under them where drafts were rejected.
function drawStrip(context, table, view, palette) {
  const data = table.data;
  const step = Math.max(1, view.span / view.width);
  for (let at = Math.floor(view.first); at < Math.min(view.first + view.span, table.columns.count); at += step) {
    const [column, last] = [Math.floor(at), Math.min(Math.ceil(at + step), table.columns.count)];
    const rows = table.rowsOf(column);
    const wide = Math.max(view.x(last) - view.x(column), 0.5);
    context.fillStyle = palette[`p-${PHASES[data.phase[rows[0]]]}`];
    context.fillRect(view.x(column), 1, wide, 6);
    let rejected = 0;
    for (let c = column; c < last; c++) for (const row of table.rowsOf(c)) rejected += 1 - data.accepted[row];
    if (!rejected) continue;
    context.fillStyle = palette.ink;
    context.fillRect(view.x(column), 8, wide, 4);
  }
}

// Round steps of about `wanted` parts of a range.
function ticks(low, high, wanted) {
  const rough = Math.max((high - low) / wanted, 1e-12);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((factor) => factor * power >= rough) * power;
  const found = [];
  for (let n = Math.ceil(low / step); n * step <= high + 1e-9; n++) found.push(n * step);
  return found;
}

function drawAxes(context, table, view, layers, high, palette, by) {
  context.fillStyle = palette.faint;
  context.textBaseline = "middle";
  context.textAlign = "right";
  const every = Math.max(1, Math.ceil(13 / high));
  for (let layer = 0; layer < layers; layer += every) {
    context.fillText(layer === 0 ? "layer 0" : layer, GUTTER - 6, STRIP + (layer + 0.5) * high);
  }
  const y = STRIP + layers * high + 11;
  const numbers = ticks(view.first, Math.min(view.first + view.span, view.count) - 1, view.width / 90);
  context.textAlign = "center";
  for (const column of numbers.filter(Number.isInteger)) {
    const text = by === "token" ? table.columns.rows[column] : table.pass(column);
    context.fillText(text, view.x(column + 0.5), y);
  }
  context.textAlign = "right";
  context.fillText(by === "token" ? "row" : "pass", GUTTER - 6, y);
}

function drawSelection(context, view, layers, high, selected, palette) {
  if (!selected) return;
  context.strokeStyle = palette.cross;
  context.lineWidth = 2;
  const x = view.x(selected.column);
  if (x + view.cell < GUTTER - 1 || x > GUTTER + view.width + 1) return;
  const wide = Math.max(view.cell, 4);
  context.strokeRect(x + (view.cell - wide) / 2, STRIP + selected.layer * high, wide, high);
  context.fillStyle = palette.cross;
  context.fillRect(x + view.cell / 2 - 1, STRIP + layers * high, 2, 4);
}

// One curve from sums over columns: a mean over the `window` columns up to each, and what it holds.
function drawCurve(context, view, box, curve, size, palette) {
  const { top, height } = box;
  const columns = Math.min(Math.ceil(view.first + view.span), curve.above.length - 1);
  const points = [];
  const step = Math.max(1, view.span / view.width);
  for (let at = Math.floor(view.first); at < columns; at += step) {
    const column = Math.floor(at);
    const value = curveValue(curve, column, Math.max(size, Math.floor(step)));
    points.push([view.x(column + 0.5), value]);
  }
  const highest = curve.limit ?? Math.max(1e-12, ...points.map(([, value]) => value ?? 0));
  const y = (value) => top + height - (value / highest) * (height - 4);
  context.textAlign = "right";
  context.textBaseline = "middle";
  const unit = curve.binary ? 1024 ** Math.floor(Math.log2(Math.max(highest, 1)) / 10) : 1;
  for (const value of ticks(0, highest / unit, 3).map((part) => part * unit)) {
    context.fillStyle = palette.line;
    context.fillRect(GUTTER, Math.round(y(value)), view.width, 1);
    context.fillStyle = palette.faint;
    context.fillText(curve.text(value), GUTTER - 6, y(value));
  }
  context.save();
  context.beginPath();
  context.rect(GUTTER, top - 2, view.width + 2, height + 4);
  context.clip();
  context.strokeStyle = palette.ink;
  context.lineWidth = 1.5;
  context.beginPath();
  let pen = false;
  for (const [x, value] of points) {
    if (value === null) pen = false;
    else if (pen) context.lineTo(x, y(value));
    else {
      context.moveTo(x, y(value));
      context.lineTo(x + 0.5, y(value));
      pen = true;
    }
  }
  context.stroke();
  context.restore();
  context.textAlign = "left";
  context.fillStyle = palette.ink;
  context.fillText(curve.label, GUTTER + 4, top - 8);
}

// Mean of a curve over the `size` columns up to a column, null where there is nothing to count.
function curveValue(curve, column, size) {
  const first = Math.max(0, column + 1 - size);
  const below = curve.below ? curve.below[column + 1] - curve.below[first] : column + 1 - first;
  return below > 0 ? (curve.above[column + 1] - curve.above[first]) / below : null;
}
