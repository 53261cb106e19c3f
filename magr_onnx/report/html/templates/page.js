// What ties the page together. The plots of the page are drawn before its load event, so that pictures and prints have them; what the library
// and the plots do is done in microtasks, and those end before the script does.

const root = document.documentElement;
const NAMES = new Set(["name", "op", "weight", "emitted", "output", "scope", "layer", "label"]);
const texts = [...document.querySelectorAll(".report-data")].map((place) => place.textContent);
const reports = texts.map((text) => JSON.parse(text, withoutWords));
const sides = reports.map(withPlaces);
const dialog = document.getElementById("details");
let shown = null;

// Figures that are no numbers have no place in a plot; names and sentences may well be those words.
function withoutWords(key, value) {
  return !NAMES.has(key) && ["nan", "inf", "-inf"].includes(value) ? null : value;
}

// Layers as the table has them: by depth, with what the proof says of each.
function withPlaces(report) {
  const rooms = report.proof?.by_node ?? {};
  const sorted = report.layers.map((l, i) => [l.depth ?? Infinity, i, l]).sort((a, b) => (a[0] === b[0] ? a[1] - b[1] : a[0] - b[0]));
  return sorted.map(([, , l], at) => ({
    errors: [],
    sweeps: [],
    ...l,
    at,
    shape: `${l.groups > 1 ? `${l.groups} × ` : ""}${l.k} × ${l.n}`,
    name: l.scope || l.name,
    node: l.name,
    estimate: l.estimate ?? l.error,
    running: l.measured ? l.error : null,
    headroom: rooms[l.emitted] ?? null,
    peak: l.magr?.max_before ? 1 - l.magr.max_after / l.magr.max_before : null,
    low: l.activation?.low,
    high: l.activation?.high,
  }));
}

async function plot(figure) {
  const chart = CHARTS[figure.dataset.chart](sides, reports);
  await draw(figure.querySelector(".plot"), chart, figure.querySelector("h3").textContent);
}

function plotAll() {
  document.querySelectorAll("figure[data-chart]").forEach(plot);
  if (shown != null && dialog.open) fill(document.getElementById("details-body"), sides[0][shown]);
}

function show(index) {
  shown = index;
  document.getElementById("details-title").textContent = sides[0][index].name;
  const others = visible();
  document.getElementById("previous").disabled = others[0] === index;
  document.getElementById("next").disabled = others[others.length - 1] === index;
  if (!dialog.open) dialog.showModal();
  dialog.scrollTop = 0;
  fill(document.getElementById("details-body"), sides[0][index]);
}

// Layers of the table in its order of now, without those filtered out.
function visible() {
  return [...document.querySelectorAll("#layers tbody tr:not([hidden])")].map((row) => Number(row.dataset.layer));
}

function step(by) {
  const others = visible();
  const next = others[others.indexOf(shown) + by];
  if (next != null) show(next);
}

function switchTheme() {
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  plotAll();
}

function download() {
  const link = element("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(JSON.parse(texts[0]), null, 1)], { type: "application/json" }));
  link.download = "report.json";
  link.click();
  URL.revokeObjectURL(link.href);
}

document.getElementById("theme").addEventListener("click", switchTheme);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", plotAll);
document.querySelectorAll("#layers").forEach(sortable);
document.querySelectorAll(".filter input").forEach(filterable);
document.getElementById("download")?.addEventListener("click", download);
if (dialog) {
  document.addEventListener("click", (event) => {
    const place = event.target.closest("[data-layer]");
    if (place) show(Number(place.dataset.layer));
  });
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  dialog.addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft") step(-1);
    if (event.key === "ArrowRight") step(1);
  });
  document.getElementById("close").addEventListener("click", () => dialog.close());
  document.getElementById("previous").addEventListener("click", () => step(-1));
  document.getElementById("next").addEventListener("click", () => step(1));
}
plotAll();
