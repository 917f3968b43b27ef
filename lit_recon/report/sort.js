"use strict";
// Sorts a table by the column whose header is pressed; what has no value stays at the end.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    const value = (row) => row.cells[column].dataset.value;
    const rows = [...body.rows];
    const numbers = rows.every((row) => !Number.isNaN(Number(value(row))));
    rows.sort((first, second) => {
      const [one, other] = [value(first), value(second)];
      if ((one === "") !== (other === "")) return one === "" ? 1 : -1;
      return sign * (numbers ? one - other : one.localeCompare(other, "en", { numeric: true }));
    });
    body.append(...rows);
  }));
}
