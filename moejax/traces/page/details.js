// The panel of one cell, built from text alone: nothing that a trace holds becomes markup.
"use strict";

const MOST_TOKENS = 24; // in the panel at once

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children.map((child) => (child instanceof Node ? child : String(child))));
  return made;
}

function chip(name) {
  const made = element("span", { class: "chip", "aria-hidden": "true" });
  made.style.background = `var(--c-${name})`;
  return made;
}

// A token as people read it: its text with its white space visible, or its number.
function tokenText(data, id) {
  if (id < 0) return "unknown token";
  const text = data.texts[id];
  return text === undefined ? `token ${id}` : JSON.stringify(text);
}

function plural(count, one) {
  return `${count.toLocaleString("en")} ${one}${count === 1 ? "" : one.endsWith("s") ? "es" : "s"}`;
}

// What a cell holds in words: "6 hit, 2 miss, moved".
function inWords(table, counts) {
  const parts = table.kinds.map((kind, code) => [counts[code], kind.label]);
  return parts.filter(([count]) => count).map(([count, label]) => `${count} ${label}`).join("; ") || "nothing";
}

function picksTable(data, table, row, layer) {
  const first = (row * data.layers + layer) * data.top;
  const own = data.exact ? [...data.exact.subarray(first, first + data.top)] : [];
  const weighted = Boolean(data.weights);
  const heads = [element("th", { class: "number" }, "expert")];
  if (weighted) heads.push(element("th", { class: "number" }, "weight"));
  heads.push(element("th", {}, table.kinds === OUTCOMES ? "outcome" : "last use"));
  const body = element("tbody");
  for (let i = first; i < first + data.top; i++) {
    if (data.picks[i] < 0) continue;
    const kind = table.kinds[table.codes[i]];
    const cells = [element("td", { class: "number" }, data.picks[i])];
    if (weighted) {
      const weight = data.weightLow + data.weights[i] * data.weightStep;
      cells.push(element("td", { class: "number" }, weight.toFixed(3)));
    }
    cells.push(element("td", {}, chip(kind.name), kind.label));
    body.append(element("tr", {}, ...cells));
  }
  const parts = [element("table", { class: "picks" }, element("thead", {}, element("tr", {}, ...heads)), body)];
  const chosen = new Set(data.picks.subarray(first, first + data.top));
  const lost = own.filter((expert) => expert >= 0 && !chosen.has(expert));
  if (lost.length) {
    parts.push(element("p", { class: "lost" }, `in place of the router's own ${lost.join(", ")}`));
  }
  return parts;
}

function tokenParts(data, table, row, layer) {
  const head = element("h3", {}, element("span", { class: "token" }, tokenText(data, data.token[row])));
  if (!data.accepted[row]) head.append(" ", element("span", { class: "badge" }, "rejected draft"));
  const place = [`sequence ${data.sequence[row]}`, `position ${data.position[row]}`];
  if (data.token[row] >= 0) place.push(`id ${data.token[row]}`);
  const parts = [head, element("p", { class: "faint" }, place.join(" · ")), ...picksTable(data, table, row, layer)];
  return element("div", { class: data.accepted[row] ? "row" : "row rejected" }, ...parts);
}

function showDetails(panel, data, table, selected, moved) {
  if (!selected) {
    panel.replaceChildren(
      element("h2", {}, "No cell chosen"),
      element("p", { class: "faint" }, "Click a cell, or press an arrow key in the chart."),
    );
    return;
  }
  const { column, layer } = selected;
  const rows = table.rowsOf(column);
  const pass = table.pass(column);
  const facts = [PHASES[data.phase[rows[0]]]];
  if (data.seconds) facts.push(`${(data.seconds[pass] * 1e3).toFixed(2)} ms`);
  if (data.began) facts.push(`began at ${data.began[pass].toFixed(3)} s`);
  if (moved !== null) facts.push(`${plural(moved, "record")} moved in all layers`);
  const parts = [
    element("h2", {}, `Pass ${pass} · layer ${layer}`),
    element("p", {}, facts.join(" · ")),
    element("p", { class: "cell" }, `${plural(rows.length, "token")}; experts: ${inWords(table, table.cell(column, layer))}`),
  ];
  for (const row of rows.subarray(0, MOST_TOKENS)) parts.push(tokenParts(data, table, row, layer));
  if (rows.length > MOST_TOKENS) {
    const rest = `and ${plural(rows.length - MOST_TOKENS, "more token")}: choose columns of tokens to see each`;
    parts.push(element("p", { class: "faint" }, rest));
  }
  panel.replaceChildren(...parts);
}
