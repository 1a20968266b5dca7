"use strict";
// Tables that sort and filter, heat maps that are recoloured and lead to their rows. Without it the
// page shows the same, in the order of the names.

const value = (row, column) => {
  const cell = row.cells[column];
  if (cell.dataset.n !== undefined) return cell.dataset.n === "" ? -Infinity : Number(cell.dataset.n);
  return cell.textContent;
};

const compare = (a, b) =>
  typeof a === "number" && typeof b === "number" ? a - b
    : String(a).localeCompare(String(b), "en", { numeric: true });

for (const table of document.querySelectorAll("table.data")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const numbers = head.dataset.numbers !== undefined;
      const now = head.getAttribute("aria-sort");
      const next = now === null ? (numbers ? "descending" : "ascending")
        : now === "ascending" ? "descending" : "ascending";
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", next);
      const sign = next === "ascending" ? 1 : -1;
      const rows = [...body.rows].map((row, place) => [value(row, column), place, row]);
      rows.sort((a, b) => sign * compare(a[0], b[0]) || a[1] - b[1]);
      body.append(...rows.map(entry => entry[2]));
    });
  });
}

const filters = new Map();
for (const controls of document.querySelectorAll(".controls[data-table]")) {
  const table = document.getElementById(controls.dataset.table);
  const words = controls.querySelector("input[type=search]");
  const equal = controls.querySelector("input[type=checkbox]");
  const count = controls.querySelector("output");
  const rows = [...table.tBodies[0].rows];
  const apply = () => {
    const wanted = words.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      const fits = wanted.every(word => text.includes(word))
        && !(equal && equal.checked && row.dataset.kind === "equal");
      row.hidden = !fits;
      shown += fits;
    }
    count.textContent = shown === rows.length ? `${rows.length} rows` : `${shown} of ${rows.length} rows`;
  };
  words.addEventListener("input", apply);
  if (equal) equal.addEventListener("change", apply);
  filters.set(table, () => { words.value = ""; if (equal) equal.checked = false; apply(); });
  apply();
}

// A cell's row may be filtered out: show every row before the browser goes there.
for (const link of document.querySelectorAll("table.map a[href], .leaf a[href]")) {
  const told = link.closest(".card").querySelector(".told");
  const tell = () => { if (told) told.textContent = link.title; };
  link.addEventListener("pointerenter", tell);
  link.addEventListener("focus", tell);
  link.addEventListener("click", () => {
    const row = document.getElementById(link.getAttribute("href").slice(1));
    const table = row && row.closest("table");
    if (table && filters.has(table)) filters.get(table)();
  });
}

for (const select of document.querySelectorAll("select[data-maps]")) {
  const group = document.getElementById(select.dataset.maps);
  const show = () => {
    for (const link of group.querySelectorAll("table.map a")) {
      const level = link.dataset[select.value];
      if (level !== undefined) link.style.setProperty("--v", level);
    }
    for (const range of group.querySelectorAll("[data-measure]")) {
      range.hidden = range.dataset.measure !== select.value;
    }
  };
  select.addEventListener("change", show);
  show();
}
