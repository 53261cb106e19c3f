// Sorting by a click on a header, and filtering. Cells have what they are sorted by in data-value; empty ones come last either way.

function sortable(table) {
  const headers = [...table.tHead.rows[0].cells];
  headers.forEach((header, column) => {
    const button = header.querySelector("button");
    const usual = header.getAttribute("aria-sort");
    button.addEventListener("click", () => {
      const numbers = button.dataset.kind === "number";
      const now = header.getAttribute("aria-sort");
      const first = usual !== "none" ? usual : numbers ? "descending" : "ascending";
      const order = now === "none" ? first : now === "ascending" ? "descending" : "ascending";
      headers.forEach((other) => other.setAttribute("aria-sort", other === header ? order : "none"));
      const sign = order === "ascending" ? 1 : -1;
      const rows = [...table.tBodies[0].rows].map((row) => [row.cells[column].dataset.value, row]);
      rows.sort(([a], [b]) => {
        if (a === "" || b === "") return (a === "") - (b === "");
        return sign * (numbers ? a - b : a.localeCompare(b, undefined, { numeric: true }));
      });
      table.tBodies[0].append(...rows.map(([, row]) => row));
    });
  });
}

function filterable(input) {
  const table = document.getElementById(input.dataset.table);
  const count = document.querySelector(`output[for="${input.id}"]`);
  const words = (row) => [...row.cells].map((cell) => cell.textContent).concat(row.dataset.text).join(" ").toLowerCase();
  const texts = new Map([...table.tBodies[0].rows].map((row) => [row, words(row)]));
  const none = table.parentElement.querySelector(".empty");
  input.addEventListener("input", () => {
    const wanted = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const [row, text] of texts) {
      row.hidden = !wanted.every((word) => text.includes(word));
      shown += !row.hidden;
    }
    count.value = `${shown} of ${texts.size}`;
    none.hidden = shown > 0;
  });
}
