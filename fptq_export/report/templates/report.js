"use strict";
// A click on a heading sorts the rows by that column, a second click the other way; cells without a number stand last.
for (const heading of document.querySelectorAll("th")) {
  heading.querySelector("button").addEventListener("click", () => {
    const table = heading.closest("table");
    const column = heading.cellIndex;
    const numeric = heading.classList.contains("number");
    const descending = heading.getAttribute("aria-sort") === "ascending";
    for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const sign = descending ? -1 : 1;
    const compare = (a, b) => {
      const [left, right] = [a.cells[column], b.cells[column]];
      if (!numeric) return sign * left.textContent.localeCompare(right.textContent, "en", { numeric: true });
      const known = [left, right].map((cell) => "value" in cell.dataset);
      if (!known[0] || !known[1]) return known[1] - known[0];
      return sign * (Number(left.dataset.value) - Number(right.dataset.value));
    };
    table.tBodies[0].append(...[...table.rows].slice(1).sort(compare));
  });
}
