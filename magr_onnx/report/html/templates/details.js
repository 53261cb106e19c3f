// The panel with all that is known of one layer.

const PANELS = [
  ["values", (l) => l.weights, "Weights", (l) => `How the values are spread${l.weights.after ? ", before and after MagR" : ""}; the scale makes the few in the tails visible.${sampled(l)}`],
  ["grid", (l) => l.weights?.grid, "Weights on the grid", (l) => `The same in units of each group's own scale, so that all groups have one grid: the dashed lines. Bars: how often each code is used. Red: beyond the grid, clipped (at the edge: all that is further out).`],
  ["magr", (l) => l.magr?.trace?.length > 1, "MagR", (l) => `Objective by iteration${l.magr.converged ? "" : ": stopped by the count"}. Relative duality gap at the end: ${digits(l.magr.gap, 2)}.`],
  ["sweeps", (l) => l.errors.length > 1, "Coordinate descent", () => "What the quantizer lowers, by sweep. Not the relative error of the table: that has another unit."],
  ["tiles", (l) => l.tiles, "Headroom by tile", (l) => `Bits left in the ${l.tiles.bits}-bit register${l.tiles.tile ? ` of every ${l.tiles.tile} terms` : ""}, for the worst input and over all columns${l.tiles.tiles > l.tiles.headroom.length ? `; the least of neighbours, of ${l.tiles.tiles} tiles` : ""}.`],
];

function sampled(l) {
  const all = l.k * l.n * l.groups;
  return l.weights.of < all ? ` Of a sample of ${l.weights.of.toLocaleString("en")} of ${all.toLocaleString("en")}.` : "";
}

const digits = (value, count) => value?.toPrecision(count) ?? "not a number";
const percent = (value, digits = 2) => (value == null ? null : `${(100 * value).toFixed(digits)}%`);

function block(l) {
  const [whole, name] = l.op === "Gather" ? [l.n, "row"] : [l.k, "channel"];
  return l.block_size == null ? null : l.block_size >= whole ? `a whole ${name}` : l.block_size;
}

function facts(l) {
  const f = l.feedback, a = l.activation, r = l.low_rank;
  return [
    ["Operator", l.op],
    ["Shape (K × N)", l.shape],
    ["Bits", l.bits ?? "float"],
    ["Block", block(l)],
    ["Stored in blocks of", l.stored_block],
    ["Error in the model", percent(l.running)],
    ["Estimated when solved", percent(l.estimate)],
    ["Calibration rows", l.rows ? l.rows.toLocaleString("en") : "none"],
    ["Depth", l.depth],
    ["Largest weight", l.magr ? `${digits(l.magr.max_before, 4)} → ${digits(l.magr.max_after, 4)}` : null],
    ["Headroom", l.headroom == null ? null : `${l.headroom.toFixed(3)} bits`],
    ["Input", a ? `${a.type}${a.high == null ? "" : `, ${digits(a.low, 4)} to ${digits(a.high, 4)}`}` : null],
    ["Error feedback", f ? (f.damping == null ? "tried, no gain" : `held-out error ${percent(Math.sqrt(f.held_out_before))} → ${percent(Math.sqrt(f.held_out_after))}`) : null],
    ["Low rank", r ? `rank ${r.rank}` : null],
    ["Mean error", l.bias_compensated ? "taken up by the bias" : null],
    ["Node", l.node],
    ["Weight", l.weight],
    ["Written as", l.emitted],
    ...Object.entries(l.solver ?? {}).filter(([name]) => !l.errors.length || !/^(error|coupled|adaptive)/.test(name)).map(([name, value]) => [name[0].toUpperCase() + name.slice(1).replaceAll("_", " "), value == null ? digits(value) : typeof value === "number" ? Number(value.toPrecision(5)) : value ? "yes" : "no"]),
  ].filter(([, value]) => value != null);
}

function element(name, text, ...children) {
  const found = document.createElement(name);
  if (text != null) found.textContent = text;
  found.append(...children);
  return found;
}

async function fill(body, layer) {
  const list = element("dl");
  for (const [name, value] of facts(layer)) list.append(element("div", null, element("dt", name), element("dd", value)));
  const notes = layer.notes.length ? [element("ul", null, ...layer.notes.map((note) => element("li", note)))] : [];
  const panels = PANELS.filter(([, there]) => there(layer));
  const old = panels.length || !layer.bits ? [] : [element("p", "This report has no histograms: an older version wrote it.")];
  const places = panels.map(([name, , title, about]) => {
    const figure = element("figure", null, element("figcaption", null, element("h3", title), element("p", about(layer))));
    const plot = element("div");
    figure.className = "chart";
    figure.dataset.panel = name;
    plot.className = "plot";
    figure.append(plot);
    return [figure, plot, name, title];
  });
  body.replaceChildren(list, ...notes, ...old, ...places.map(([figure]) => figure));
  for (const [, plot, name, title] of places) if (plot.isConnected) await draw(plot, CHARTS[name](layer), `${title} of ${layer.name}`);
}
