"""One static page over the table of results: sorted and filtered by the reader's own browser.

It loads nothing and sends nothing: script, style and data are in the file.
"""

import html
import json
from collections.abc import Iterable
from typing import NamedTuple

import pandas as pd

FILTERS = ("study", "task", "method", "seed", "train_fraction", "places", "split", "metric")
FIRST_SEEN = {"seed": "mean", "split": "test", "metric": "auroc"}  # filters when it is opened
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'"

_STYLE = """
body { font: 16px/1.5 sans-serif; margin: 2em auto; max-width: 1200px; padding: 0 1em; }
table { border-collapse: collapse; font-size: 13px; width: 100%; }
th, td { border-bottom: 1px solid #ccc; padding: .25em .5em; text-align: left; }
td { white-space: nowrap; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
th button { all: unset; cursor: pointer; font-weight: bold; }
th button:focus-visible { outline: 2px solid; }
.wide { overflow-x: auto; }
label { display: inline-block; margin: 0 1em .5em 0; font-size: 14px; }
"""

_SCRIPT = """
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const { columns, filters, first } = data;
// Texts are numbers of an entry in the column's list.
const rows = data.rows.map((row) => row.map(
  (value, number) => value !== null && data.texts[number] ? data.texts[number][value] : value));
const body = document.querySelector("tbody"), said = document.getElementById("count");
const chosen = {}, order = { column: null, up: true };
const shown = (value) => value === null ? "" : String(value);
const compare = (a, b) => {
  if (a === null || b === null) return (a === null) - (b === null);  // empty ones last
  const way = order.up ? 1 : -1;
  if (typeof a === "number" && typeof b === "number") return way * (a - b);
  return way * shown(a).localeCompare(shown(b), "en", { numeric: true });
};
function draw() {
  let found = rows.filter((row) => filters.every(
    (name) => !chosen[name] || shown(row[columns.indexOf(name)]) === chosen[name]));
  if (order.column !== null) {
    found = [...found].sort((a, b) => compare(a[order.column], b[order.column]));
  }
  body.replaceChildren(...found.map((row) => {
    const line = document.createElement("tr");
    for (const value of row) {
      const cell = line.insertCell();
      cell.textContent = shown(value);
      if (typeof value === "number") cell.className = "number";
    }
    return line;
  }));
  said.textContent = `${found.length} of ${rows.length} rows`;
}
document.querySelectorAll("th").forEach((head, number) => {
  head.firstChild.addEventListener("click", () => {
    order.up = order.column === number ? !order.up : true;
    order.column = number;
    document.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", order.up ? "ascending" : "descending");
    draw();
  });
});
for (const name of filters) {
  const values = [...new Set(rows.map((row) => shown(row[columns.indexOf(name)])))];
  const label = document.createElement("label"), choice = document.createElement("select");
  label.textContent = `${name} `;
  choice.name = name;
  choice.add(new Option("all", ""));
  for (const value of values.filter(Boolean).sort()) choice.add(new Option(value, value));
  if (values.includes(first[name])) choice.value = chosen[name] = first[name];
  choice.addEventListener("change", () => { chosen[name] = choice.value; draw(); });
  label.append(choice);
  document.getElementById("filters").append(label);
}
draw();
"""


class Report(NamedTuple):
    """A line above the table: what a set of runs says, and where it stands at length."""

    name: str
    sentence: str
    link: str  # relative to the page


def results_page(table: pd.DataFrame, reports: Iterable[Report]) -> str:
    """The page as HTML, of `results_table.results_table`, with reports in reading order."""
    texts, coded = [], table.copy()
    for name in table:
        numbers, entries = pd.factorize(table[name])
        is_text = not pd.api.types.is_numeric_dtype(table[name])
        texts.append(list(entries) if is_text else None)
        if is_text:  # written once each: half the bytes
            coded[name] = pd.Series(numbers, table.index).where(numbers >= 0)
    rows = json.loads(coded.to_json(orient="values", double_precision=5))
    data = {"columns": list(table), "rows": rows, "texts": texts}
    data |= {"filters": FILTERS, "first": FIRST_SEEN}
    # Nothing in the data may end the script that holds it.
    inlined = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    lines = "\n".join(
        f'<li><a href="{html.escape(link)}">{html.escape(name)}</a>: {html.escape(sentence)}</li>'
        for name, sentence, link in reports
    )
    heads = "".join(f"<th><button>{html.escape(name)}</button></th>" for name in table)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width">
<title>Results: DINOv2 for satellite imagery</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>Results</h1>
<ul>
{lines}
</ul>
<p>Intervals are 95 % and draw whole places; seed <em>mean</em> is the mean over seeds. A click on
a column sorts by it. The same rows as a file: <a href="results.csv">results.csv</a>.</p>
<div id="filters"></div>
<p id="count" aria-live="polite"></p>
<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody></tbody></table></div>
<noscript>The table needs JavaScript; results.csv holds the same rows.</noscript>
<script type="application/json" id="data">{inlined}</script>
<script>{_SCRIPT}</script>
</body>
</html>
"""
