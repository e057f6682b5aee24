// Columns of the chart and what each of their cells holds, for a choice of phases and sequences.
"use strict";

const PHASES = ["prefill", "decode", "draft", "verify"];
const DRAFT = 2; // a guess at what the model will do: no use of an expert by the model itself

// What a pick can be, by code; `good` ones count as hits, those that are not `known` do not count.
const OUTCOMES = [
  { name: "unknown", label: "unknown", known: false },
  { name: "hit", label: "hit", known: true, good: true },
  { name: "miss", label: "miss, moved", known: true, moved: true },
  { name: "prefetched", label: "hit by a prefetch", known: true, good: true, moved: true },
  { name: "host", label: "miss, on the host", known: true },
  { name: "substitute", label: "substituted", known: true, good: true },
  { name: "low", label: "from low bits", known: true },
];
const REUSE = [
  { name: "unknown", label: "no expert", known: false },
  { name: "recent", label: "used shortly before", known: true, good: true },
  { name: "first", label: "first use", known: true },
  { name: "earlier", label: "used longer ago", known: true },
];

// Codes of `REUSE` for every pick: whether its expert was used in the `recent` passes before.
function reuse(data, recent) {
  const { rows, layers, top, experts, picks, run } = data;
  const codes = new Uint8Array(picks.length);
  const last = new Int32Array(layers * experts).fill(-1);
  const before = new Int32Array(layers * experts).fill(-1);
  for (let row = 0, i = 0; row < rows; row++) {
    for (let layer = 0; layer < layers; layer++) {
      for (let k = 0; k < top; k++, i++) {
        if (picks[i] < 0) continue;
        const id = layer * experts + picks[i];
        if (data.phase[row] === DRAFT) {
          codes[i] = last[id] < 0 ? 2 : run[row] - last[id] <= recent ? 1 : 3;
          continue;
        }
        if (last[id] !== run[row]) {
          before[id] = last[id];
          last[id] = run[row];
        }
        codes[i] = before[id] < 0 ? 2 : run[row] - before[id] <= recent ? 1 : 3;
      }
    }
  }
  return codes;
}

// The rows of each column: passes, or single tokens; those without a chosen row are left out.
function chooseColumns(data, choice) {
  const rows = [];
  const starts = [];
  let pass = -1;
  for (let row = 0; row < data.rows; row++) {
    if (!choice.phases.has(data.phase[row])) continue;
    if (choice.sequence >= 0 && data.sequence[row] !== choice.sequence) continue;
    if (choice.by === "token" || data.run[row] !== pass) starts.push(rows.length);
    pass = data.run[row];
    rows.push(row);
  }
  starts.push(rows.length);
  return { rows: Int32Array.from(rows), starts: Int32Array.from(starts), count: starts.length - 1 };
}

// Sums over columns from the left of distinct experts by code, so that any range costs the same.
class Table {
  constructor(data, columns, codes, kinds) {
    Object.assign(this, { data, columns, codes, kinds });
    this.apart = columns.rows.some((row) => data.phase[row] !== DRAFT);
    this.own = new Uint32Array(columns.count + 1); // columns that are not of drafts, from the left
    for (let c = 0; c < columns.count; c++) this.own[c + 1] = this.own[c] + !this.drafted(c);
    this.faded = this.own[columns.count] < columns.count;
    this.stride = columns.count + 1;
    this.sums = kinds.map(() => new Uint32Array(data.layers * this.stride));
    const seen = new Int32Array(data.experts).fill(-1);
    for (let layer = 0, mark = 0; layer < data.layers; layer++) {
      const now = new Uint32Array(kinds.length);
      for (let column = 0; column < columns.count; column++, mark++) {
        this.countCell(column, layer, seen, mark, now);
        const at = layer * this.stride + column + 1;
        for (let kind = 0; kind < kinds.length; kind++) this.sums[kind][at] = now[kind];
      }
    }
    this.needed = this.total((kind) => kind.known);
    this.good = this.total((kind) => kind.good);
    this.moved = this.total((kind) => kind.moved);
  }

  countCell(column, layer, seen, mark, now) {
    const { data, columns, codes } = this;
    for (let r = columns.starts[column]; r < columns.starts[column + 1]; r++) {
      const first = (columns.rows[r] * data.layers + layer) * data.top;
      for (let i = first; i < first + data.top; i++) {
        const expert = data.picks[i];
        if (expert < 0 || seen[expert] === mark) continue;
        seen[expert] = mark;
        now[codes[i]]++;
      }
    }
  }

  // Whether a column is of drafts, beside others that are not.
  drafted(column) {
    return this.apart && this.data.phase[this.columns.rows[this.columns.starts[column]]] === DRAFT;
  }

  // Sums over layers of the codes that pass a test, from the left, drafts left out: [columns + 1].
  total(test) {
    const sums = new Float64Array(this.stride);
    this.kinds.forEach((kind, code) => {
      if (!test(kind)) return;
      for (let c = 0; c < this.columns.count; c++) {
        if (this.drafted(c)) continue;
        for (let layer = 0; layer < this.data.layers; layer++) sums[c + 1] += this.of(code, layer, c, c + 1);
      }
    });
    for (let c = 1; c < this.stride; c++) sums[c] += sums[c - 1];
    return sums;
  }

  // Distinct experts of one code in the columns from `first` up to `last`.
  of(code, layer, first, last) {
    const at = layer * this.stride;
    return this.sums[code][at + last] - this.sums[code][at + first];
  }

  cell(column, layer) {
    return this.kinds.map((_, code) => this.of(code, layer, column, column + 1));
  }

  pass(column) {
    return this.data.run[this.columns.rows[this.columns.starts[column]]];
  }

  rowsOf(column) {
    return this.columns.rows.subarray(this.columns.starts[column], this.columns.starts[column + 1]);
  }
}

// Records moved, summed from the left: as the run counted them where all rows of its passes are
// shown, else those that outcomes tell of.
function movedSums(data, table, choice) {
  const counted = data.moved && choice.by === "pass" && choice.sequence < 0;
  if (!counted) return { sums: table.moved, counted };
  const sums = new Float64Array(table.stride);
  for (let c = 0; c < table.columns.count; c++) sums[c + 1] = sums[c] + data.moved[table.pass(c)];
  return { sums, counted };
}
