// Plots as Vega-Lite specifications. Each is a function of the data alone; `draw` adds size and colours.

const PERCENT = { format: ".1%" };

// The computed colour of a variable of the style sheet, in the theme of now.
function colour(name) {
  const probe = document.createElement("span");
  probe.style.color = `var(--${name})`;
  document.body.append(probe);
  const found = getComputedStyle(probe).color;
  probe.remove();
  return found;
}

function config() {
  const [ink, soft, line] = ["ink", "soft", "line"].map(colour);
  return {
    background: "transparent",
    font: "system-ui, sans-serif",
    view: { stroke: null },
    axis: { labelColor: soft, titleColor: soft, gridColor: line, domainColor: line, tickColor: line, titleFontWeight: "normal", labelLimit: 120 },
    legend: { labelColor: ink, titleColor: soft, orient: "top", title: null, labelLimit: 260, columns: 2 },
    text: { color: ink },
  };
}

async function draw(place, spec, about) {
  const whole = { width: "container", height: 190, autosize: { type: "fit-x", contains: "padding" }, description: about, config: config(), ...spec };
  await vegaEmbed(place, whole, { actions: false, renderer: "svg", ast: false, tooltip: { theme: "custom" } });
}

// Layers along an axis: their order is their place in the table, their names would not fit. All have a place, those without a value too.
function along(count) {
  const scale = { domain: Array.from({ length: count }, (_, i) => i) };
  return { field: "at", type: "ordinal", scale, axis: { labels: false, ticks: false, title: "layers, inputs to outputs" } };
}

// Ticks in as many digits as they have, so that those of small values differ.
function percentAxis(title) {
  return { title, axis: { format: "~p" }, type: "quantitative" };
}

const CHARTS = {
  errors: ([layers]) => ({
    data: { values: layers },
    encoding: { x: along(layers.length) },
    layer: [
      {
        mark: { type: "bar", color: colour("fill"), cursor: "pointer" },
        encoding: { y: { field: "error", ...percentAxis("relative error") }, tooltip: tips("name", "shape", "bits", "error", "estimate") },
      },
      ...(layers.some((l) => l.running != null) ? [{
        transform: [{ filter: "isValid(datum.running) && isValid(datum.estimate)" }],
        mark: { type: "line", point: { filled: true, size: 22, color: colour("second") }, color: colour("second"), strokeWidth: 1, opacity: 0.9 },
        encoding: { y: { field: "estimate", ...percentAxis("relative error") }, tooltip: tips("name", "error", "estimate") },
      }] : []),
    ],
  }),

  depth: ([layers]) => {
    const y = (aggregate) => ({ aggregate, field: "error", ...percentAxis("relative error") });
    const values = layers.filter((l) => l.depth != null && l.error != null);
    const deepest = Math.max(1, ...values.map((l) => l.depth)); // in a plot of layers tickMinStep does not reach the axis
    return {
      data: { values },
      encoding: { x: { field: "depth", type: "quantitative", title: "layers before", axis: { tickCount: Math.min(deepest, 15) } } },
      layer: [
        { mark: { type: "area", color: colour("fill"), opacity: 0.45 }, encoding: { y: y("max"), y2: { aggregate: "min", field: "error" } } },
        {
          mark: { type: "line", color: colour("accent"), point: { size: 26, color: colour("accent") } },
          encoding: {
            y: y("median"),
            tooltip: [
              { field: "depth", title: "layers before" },
              { aggregate: "count", title: "layers" },
              { aggregate: "median", field: "error", title: "median", ...PERCENT },
              { aggregate: "max", field: "error", title: "largest", ...PERCENT },
            ],
          },
        },
      ],
    };
  },

  peaks: ([layers]) => ({
    data: { values: layers },
    mark: { type: "bar", color: colour("fill") },
    encoding: { x: along(layers.length), y: { field: "peak", ...percentAxis("lower by") }, tooltip: tips("name", "peak") },
  }),

  headroom: ([layers]) => ({
    data: { values: layers },
    mark: { type: "bar", color: colour("fill") },
    encoding: { x: along(layers.length), y: { field: "headroom", type: "quantitative", title: "bits" }, tooltip: tips("name", "headroom") },
  }),

  activations: ([layers]) => ({
    data: { values: layers.filter((l) => l.high != null) },
    mark: { type: "bar", color: colour("fill") },
    encoding: {
      x: along(layers.length),
      y: { field: "low", type: "quantitative", title: "value", scale: { type: "symlog" }, axis: { tickCount: 5 } },
      y2: { field: "high" },
      tooltip: tips("name", "low", "high"),
    },
  }),

  convergence: ([layers]) => {
    const sweeps = layers.flatMap((l) => l.errors.map((e, i) => ({ name: l.name, sweep: l.sweeps[i] ?? i, left: l.errors[0] ? e / l.errors[0] : 1 })));
    return {
      data: { values: sweeps },
      mark: { type: "line", color: colour("accent"), opacity: Math.max(0.15, Math.min(0.7, 12 / layers.length)), point: { size: 12, color: colour("accent") } },
      encoding: {
        x: { field: "sweep", type: "quantitative", title: "sweeps", axis: { tickMinStep: 1 } },
        y: { field: "left", title: "error left", type: "quantitative", axis: { format: ".0%" }, scale: { zero: false } },
        detail: { field: "name" },
        tooltip: [{ field: "name", title: "layer" }, { field: "sweep" }, { field: "left", title: "error left", ...PERCENT }],
      },
    };
  },

  tradeoff: (_, [report]) => {
    const a = report.assignment;
    const share = (p, kind) => ({ kind, size: p.bytes / a.source_bytes, loss: p.loss ?? p.predicted, label: p.label || kind });
    const result = a.attempts.slice(-1);
    const most = 1.15 * Math.max(...[...result, ...(a.uniform.length ? a.uniform : a.curve)].map((p) => p.bytes)) / a.source_bytes;
    const seen = (p) => p.loss > 0 && p.size <= most;
    const axes = {
      x: { field: "size", type: "quantitative", title: "of the source's size", axis: { format: ".0%" }, scale: { zero: false } },
      y: { field: "loss", type: "quantitative", title: a.metric, scale: { type: "log" }, axis: { format: ".0e", tickCount: 4 } },
      tooltip: [{ field: "label", title: "choice" }, { field: "size", ...PERCENT }, { field: "loss", format: ".3g" }],
    };
    return {
      encoding: axes,
      layer: [
        { data: { values: a.curve.map((p) => share(p, "mixed")).filter(seen) }, mark: { type: "line", color: colour("accent") } },
        { data: { values: a.uniform.map((p) => share(p, "all")).filter(seen) }, mark: { type: "point", shape: "square", filled: true, size: 45, color: colour("soft") } },
        { data: { values: result.map((p) => share(p, "the result")) }, mark: { type: "point", shape: "diamond", filled: true, size: 170, opacity: 1, color: colour("second") } },
      ].filter((layer) => layer.data.values.length),
    };
  },

  both: (sides) => sideBySide(sides, "estimate"),
  running: (sides) => sideBySide(sides, "running"),

  // The spread of the values of one weight. Tails are what MagR changes, and they are a few weights in thousands: hence the scale.
  values: (layer) => {
    const w = layer.weights;
    const width = (w.high - w.low) / w.before.length;
    const bins = (counts, kind) => counts.map((count, i) => ({ kind, count, from: w.low + i * width, to: w.low + (i + 1) * width }));
    const values = [...bins(w.before, "before"), ...(w.after ? bins(w.after, "after MagR") : [])];
    return twoHistograms(values, {
      x: { field: "from", type: "quantitative", title: "weight", axis: { tickCount: 8 }, scale: { nice: false } },
      y: { field: "count", type: "quantitative", title: "weights", scale: { type: "symlog" }, axis: { values: [0, 1, 10, 100, 1e3, 1e4, 1e5, 1e6], labelExpr: "format(datum.value, datum.value < 1000 ? 'd' : '~s')" } },
    }, w.after != null);
  },

  // The same in units of each group's own grid, where the codes are the integers.
  grid: (layer) => {
    const g = layer.weights.grid;
    const width = (g.high - g.low) / g.before.length;
    const share = (counts) => { const all = counts.reduce((a, b) => a + b, 0); return counts.map((c) => c / all); };
    const bins = (counts, kind) => share(counts).map((s, i) => ({ kind, count: s / width, from: g.low + i * width, to: g.low + (i + 1) * width }));
    const each = (g.top + 1) / g.codes.length;
    const codes = share(g.codes).map((s, i) => ({ code: each === 1 ? `${i}` : `${i * each} to ${(i + 1) * each - 1}`, from: i * each - 0.5, to: (i + 1) * each - 0.5, count: s / each, zero: 0 }));
    const lines = g.top <= 31 ? Array.from({ length: g.top + 1 }, (_, i) => ({ at: i })) : [{ at: 0 }, { at: g.top }];
    const x = { type: "quantitative", title: "weight in steps of its grid", scale: { domain: [g.low, g.high], nice: false }, axis: { grid: false, tickMinStep: 1 } };
    const y = { field: "count", type: "quantitative", title: "share a step", axis: { format: ".0%" } };
    return {
      encoding: { y },
      layer: [
        {
          data: { values: [{ from: g.low, to: -0.5 }, { from: g.top + 0.5, to: g.high }] },
          mark: { type: "rect", color: colour("bad"), opacity: 0.09 },
          encoding: { x: { field: "from", ...x }, x2: { field: "to" }, y: { value: 0 }, y2: { value: "height" } },
        },
        {
          data: { values: codes },
          mark: { type: "rect", color: colour("fill"), opacity: 0.55, stroke: colour("card"), strokeWidth: 1 },
          encoding: { x: { field: "from", ...x }, x2: { field: "to" }, y2: { field: "zero" }, tooltip: [{ field: "code" }, { field: "count", title: "share", ...PERCENT }] },
        },
        { data: { values: lines }, mark: { type: "rule", color: colour("soft"), opacity: 0.35, strokeDash: [2, 3] }, encoding: { x: { field: "at", ...x }, y: { value: 0 }, y2: { value: "height" } } },
        {
          data: { values: [...bins(g.before, "before"), ...(g.after ? bins(g.after, "after MagR") : [])] },
          mark: { type: "line", interpolate: "step-after", strokeWidth: 1.6 },
          encoding: { x: { field: "from", ...x }, color: kinds(g.after != null), order: { field: "from" } },
        },
      ],
    };
  },

  magr: (layer) => curve(layer.magr.trace, layer.magr.steps ?? [], "iterations", "objective"),
  sweeps: (layer) => curve(layer.errors, layer.sweeps, "sweeps", "layer error"),

  tiles: (layer) => ({
    data: { values: layer.tiles.headroom.map((bits, tile) => ({ tile, bits })) },
    mark: { type: "bar", color: colour("fill") },
    encoding: {
      x: { field: "tile", type: "ordinal", title: "tiles along K", axis: { labelOverlap: true, labelAngle: 0 } },
      y: { field: "bits", type: "quantitative", title: "bits left" },
      tooltip: [{ field: "tile" }, { field: "bits", format: ".3f" }],
    },
  }),
};

// Values at steps; reports of older versions do not say which.
function curve(values, steps, x, y) {
  return {
    height: 150,
    data: { values: values.map((value, i) => ({ at: steps[i] ?? i, value })) },
    mark: { type: "line", color: colour("accent"), point: { size: 22, color: colour("accent") } },
    encoding: {
      x: { field: "at", type: "quantitative", title: x, axis: { tickMinStep: 1 } },
      y: { field: "value", type: "quantitative", title: y, scale: { zero: false }, axis: { format: ".3g", tickCount: 5 } },
      tooltip: [{ field: "at", title: x }, { field: "value", title: y, format: ".5g" }],
    },
  };
}

function kinds(two) {
  const scale = { domain: two ? ["before", "after MagR"] : ["before"], range: [colour("accent"), colour("second")] };
  return { field: "kind", type: "nominal", scale, legend: two ? { symbolOpacity: 1 } : null };
}

function twoHistograms(values, axes, two) {
  return {
    data: { values },
    mark: { type: "area", interpolate: "step-after", opacity: 0.2, line: { strokeWidth: 1.6, opacity: 1 } },
    encoding: { ...axes, y: { ...axes.y, stack: null }, color: kinds(two), order: { field: "from" } },
  };
}

// One line a report, layers by name in the order of the first.
function sideBySide(sides, field) {
  const place = new Map();
  sides.flat().forEach((l) => place.has(l.name) || place.set(l.name, place.size));
  const values = sides.flatMap((layers, i) => layers.filter((l) => l[field] != null).map((l) => ({ ...l, at: place.get(l.name), side: "AB"[i] })));
  return {
    data: { values },
    mark: { type: "line", strokeWidth: 1.4, point: { size: 24 } },
    encoding: {
      x: along(place.size),
      y: { field, ...percentAxis("relative error") },
      color: { field: "side", type: "nominal", scale: { domain: ["A", "B"], range: [colour("accent"), colour("second")] } },
      tooltip: [{ field: "side", title: "report" }, ...tips("name", "bits", field)],
    },
  };
}

const TIPS = {
  name: { title: "layer" },
  shape: { title: "K × N" },
  bits: {},
  error: { format: ".2%" },
  running: { title: "in the model", format: ".2%" },
  estimate: { title: "estimated when solved", format: ".2%" },
  peak: { title: "largest weight lower by", format: ".3p" },
  headroom: { title: "bits left", format: ".3f" },
  low: { format: ".4g" },
  high: { format: ".4g" },
};

function tips(...fields) {
  return fields.map((field) => ({ field, ...TIPS[field] }));
}
