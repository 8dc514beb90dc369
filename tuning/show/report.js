// Draws the figures from the page's own JSON; trials.js, which follows, shows the table of trials. Texts of a run are set by
// textContent, or escaped by `plain` where Plotly would read them as markup.
"use strict";

const data = JSON.parse(document.getElementById("packed-data").textContent);
const STATUSES = ["completed", "converged", "stopped", "diverged", "out_of_memory", "failed", "running", "interrupted"];
const SYMBOLS = ["circle", "diamond", "square", "x", "triangle-up", "cross", "star", "triangle-down"];
const MEASURED = /second|_s$|_ms$|_mb$/; // seconds, images a second, milliseconds, megabytes
const POINTS = 15000; // of the learning curves; with more, only every second or third epoch is drawn
const trials = data.trials || {};
const metric = data.metric;
const all = (data.ids || []).map((_, index) => index);
const place = new Map((data.ids || []).map((id, index) => [id, index]));
const searched = all.filter((index) => !["probe", "finalist"].includes(trials.origin[index]));
const configs = data.varied || []; // configuration columns that differ between trials

const token = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
const plain = (value) => String(value).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const words = (name) => name.replace(/^config_/, "").replaceAll("_", " ");
const value = (key, index) => (trials[key] ? trials[key][index] : null);
const finite = (values) => values.filter((one) => one !== null && one !== undefined);

function shown(one) {
  if (one === null || one === undefined) return "–";
  if (typeof one !== "number") return String(one);
  if (Number.isInteger(one)) return one.toLocaleString("en");
  return Math.abs(one) >= 1e-3 && Math.abs(one) < 1e4 ? one.toFixed(4) : one.toExponential(2);
}

// Two or three digits of a configuration value or a time are enough.
function cell(key, one) {
  if (MEASURED.test(key) && typeof one === "number") return one.toFixed(2);
  if (!key.startsWith("config_") || typeof one !== "number" || Number.isInteger(one)) return shown(one);
  return Math.abs(one) < 1e-2 ? one.toExponential(1) : String(Number(one.toPrecision(3)));
}

const short = (one) => (Math.abs(one) >= 1e-3 ? one.toPrecision(3) : shown(one));

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, one] of Object.entries(attributes)) made.setAttribute(name, one);
  made.append(...children);
  return made;
}

async function unpack(id) {
  const packed = atob(document.getElementById(id).textContent);
  const bytes = new Uint8Array(packed.length);
  for (let index = 0; index < packed.length; index++) bytes[index] = packed.charCodeAt(index);
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
}

function once(make) {
  let made = null;
  return () => (made = made || make());
}

const loadPlotly = once(async () => {
  const script = document.createElement("script");
  script.textContent = await unpack("packed-plotly");
  document.head.append(script);
});
const loadHistory = once(async () => JSON.parse(await unpack("packed-history")));

// ---- figures: each returns traces, layout and height, or null if there is nothing to draw

function timeAxis(longest) {
  const [seconds, unit] = longest > 2 * 3600 ? [3600, "hours"] : longest > 120 ? [60, "minutes"] : [1, "seconds"];
  return { scale: (one) => (one === null ? null : one / seconds), title: `search time (${unit})` };
}

// The range of an axis without its outliers, and their number: one diverged trial would flatten all others.
function frame(values, lower = data.lower) {
  const sorted = finite(values).sort((a, b) => (lower ? a - b : b - a)); // the best first
  if (sorted.length < 8) return {};
  const [best, worst] = [sorted[0], sorted[sorted.length - 1]];
  const spread = sorted[Math.floor(sorted.length / 2)] - best;
  const end = best + 4 * spread;
  const outside = sorted.filter((one) => (lower ? one > end : one < end)).length;
  if (Math.abs(worst - best) <= 6 * Math.abs(spread) || !outside) return {};
  const range = [best - 0.3 * spread, end];
  return { range: lower ? range : range.reverse(), outside };
}

function outsideNote(outside, where = data.lower ? "above" : "below") {
  if (!outside) return [];
  const text = `${outside} ${where}; double-click to show all`;
  const at = { xref: "paper", yref: "paper", x: 1, xanchor: "right", y: 1, yanchor: "top", showarrow: false };
  return [{ ...at, text, font: { size: 11, color: token("quiet") }, bgcolor: token("page") }];
}

function label(index) {
  const lines = [`<b>${plain(data.ids[index])}</b> ${plain(value("status", index))}`];
  if (value(metric, index) !== null) lines.push(`${metric} ${shown(value(metric, index))} at epoch ${value("best_epoch", index)}`);
  for (const key of configs.slice(0, 6)) lines.push(`${words(key)} ${plain(cell(key, value(key, index)))}`);
  return lines.join("<br>");
}

function points(name, indices, x, y, marker) {
  return {
    type: "scatter", mode: "markers", name: plain(name), x: indices.map(x), y: indices.map(y), text: indices.map(label),
    hovertemplate: "%{text}<extra></extra>", marker: { size: 8, opacity: 0.85, ...marker },
  };
}

function byStatus(indices, x, y) {
  return STATUSES.map((status, number) => {
    const mine = indices.filter((index) => value("status", index) === status);
    return mine.length && points(words(status), mine, x, y, { color: token(status), symbol: SYMBOLS[number] });
  }).filter(Boolean);
}

function byBackbone(indices, x, y) {
  const names = [...new Set(indices.map((index) => value("config_backbone", index)))].sort();
  return names.map((name, number) => {
    const mine = indices.filter((index) => value("config_backbone", index) === name);
    const colour = token(STATUSES[number % STATUSES.length]);
    return points(name, mine, x, y, { color: colour, symbol: SYMBOLS[Math.floor(number / 8 + number) % 8] });
  });
}

const withValue = (...keys) => searched.filter((index) => keys.every((key) => value(key, index) !== null));

function line(name, x, y, colour, more = {}) {
  return { type: "scatter", mode: "lines", name: plain(name), x, y, line: { color: colour, width: 2 }, ...more };
}

function comparedRuns(key, axis) {
  const traces = data.runs.map((run, number) => {
    const last = run.value.length ? [run.value[run.value.length - 1]] : [];
    const x = [...run[key], ...last.map(() => run.end[key])].map(axis.scale);
    const dash = ["solid", "dash", "dot", "dashdot"][Math.floor(number / 8) % 4];
    const drawn = { color: token(STATUSES[number % 8]), width: 2.5, shape: "hv", dash };
    return line(run.name, x, [...run.value, ...last], token("ink"), { line: drawn, hovertemplate: "%{y:.4f}" });
  });
  const best = frame(data.runs.flatMap((run) => run.value));
  const yaxis = { title: { text: "best " + metric }, ...(best.range ? { range: best.range } : {}) };
  return { traces, layout: { xaxis: { title: { text: axis.title } }, yaxis, hovermode: "x unified" } };
}

const figures = {
  time() {
    const mine = withValue(metric, "best_wall_s");
    const longest = mine.reduce((end, index) => Math.max(end, value("best_wall_s", index)), 1);
    const axis = timeAxis(longest);
    const best = data.best;
    const x = [...best.wall_s, ...(best.wall_s.length ? [longest] : [])].map(axis.scale);
    const y = [...best.value, ...best.value.slice(-1)];
    const steps = { line: { color: token("ink"), width: 2, shape: "hv" }, hoverinfo: "skip" };
    const traces = byStatus(mine, (index) => axis.scale(value("best_wall_s", index)), (index) => value(metric, index));
    const { range, outside } = frame(mine.map((index) => value(metric, index)));
    return {
      traces: [...traces, line("best so far", x, y, token("ink"), steps)],
      layout: { xaxis: { title: { text: axis.title } }, yaxis: { title: { text: metric }, range }, annotations: outsideNote(outside) },
    };
  },

  async curves() {
    const { columns, trials: rows } = (await loadHistory()).epochs;
    const [epoch, loss] = [columns.indexOf("epoch"), columns.indexOf(metric)];
    if (loss < 0) return null;
    const mine = data.curves.filter((id) => rows[id]);
    const seen = [];
    const step = Math.ceil(mine.reduce((sum, id) => sum + rows[id][epoch].length, 0) / POINTS);
    const traces = STATUSES.map((status) => {
      const [x, y, text] = [[], [], []];
      for (const id of mine.filter((one) => value("status", place.get(one)) === status)) {
        const some = (_, row) => row % step === 0 || row === rows[id][epoch].length - 1;
        const losses = rows[id][loss].filter(some);
        x.push(...rows[id][epoch].filter(some), null);
        y.push(...losses, null);
        text.push(...losses.map(() => plain(id)), "");
        seen.push(...losses);
      }
      const style = { mode: "lines+markers", text, opacity: mine.length > 40 ? 0.5 : 0.8, marker: { size: 3 }, connectgaps: false };
      const drawn = { color: token(status), width: 1.4 };
      return x.length && line(words(status), x, y, "", { ...style, line: drawn, hovertemplate: `%{text}, epoch %{x}: %{y:.4f}<extra></extra>` });
    }).filter(Boolean);
    const chosen = rows[data.chosen];
    if (chosen) traces.push(line("chosen: " + data.chosen, chosen[epoch], chosen[loss], token("ink"), { line: { color: token("ink"), width: 3 } }));
    const { range, outside } = frame(seen);
    const some = mine.length < searched.length ? ` (${mine.length} of ${searched.length} trials, including the best)` : "";
    return {
      traces,
      layout: { xaxis: { title: { text: "epoch" + some } }, yaxis: { title: { text: metric }, range }, annotations: outsideNote(outside) },
    };
  },

  importance() {
    const { parameter, importance } = data.importance;
    const bars = { type: "bar", orientation: "h", y: parameter.map((one) => plain(words(one))), x: importance, marker: { color: token("completed") } };
    return {
      traces: [{ ...bars, hovertemplate: "%{y}: %{x:.1%}<extra></extra>" }],
      layout: { xaxis: { tickformat: ".0%", rangemode: "tozero" }, yaxis: { autorange: "reversed", showgrid: false }, bargap: 0.35 },
      height: 80 + 30 * parameter.length,
    };
  },

  rates() {
    if (!trials.config_learning_rate) return null;
    const mine = withValue(metric, "config_learning_rate");
    const traces = byBackbone(mine, (index) => value("config_learning_rate", index), (index) => value(metric, index));
    const { range, outside } = frame(mine.map((index) => value(metric, index)));
    const xaxis = { title: { text: "learning rate" }, type: "log", dtick: 1, tickformat: ".0e" };
    return { traces, layout: { xaxis, yaxis: { title: { text: metric }, range }, annotations: outsideNote(outside) } };
  },

  depths() {
    const { backbone, depth, trials: counts, trial_id: ids, value: values } = data.depths;
    const names = [...new Set(backbone)].sort().reverse();
    const depths = [...Array(6).keys()];
    const cells = names.map((name) => depths.map((one) => backbone.findIndex((other, row) => other === name && depth[row] === one)));
    const at = (row, read, other) => (row < 0 ? other : read(row));
    const { range } = frame(values);
    if (!finite(values).length) return null;
    const [low, high] = range || [Math.min(...finite(values)), Math.max(...finite(values))];
    const scale = [[0, token("raised")], [1, token("heat")]];
    const text = cells.map((cell) => cell.map((row) => at(row, (one) => (values[one] === null ? "no loss" : short(values[one])), "")));
    const hover = cells.map((cell) => cell.map((row) => at(row, (one) => `${plain(backbone[one])}, depth ${depth[one]}<br>best ${ids[one] ?? "none"} of ${counts[one]} trials`, "not tried")));
    return {
      traces: [{
        type: "heatmap", x: ["head", "1", "2", "3", "4", "all"], y: names.map(plain), z: cells.map((cell) => cell.map((row) => at(row, (one) => values[one], null))),
        text, hovertext: hover, texttemplate: "%{text}", hovertemplate: "%{hovertext}<extra></extra>", hoverongaps: false, xgap: 3, ygap: 3,
        zmin: low, zmax: high, colorscale: scale, reversescale: data.lower, showscale: false,
      }],
      layout: { xaxis: { title: { text: "stages unfrozen, from the head" }, type: "category", showgrid: false }, yaxis: { automargin: true, showgrid: false } },
      height: 100 + 46 * names.length,
    };
  },

  gap() {
    const mine = withValue("train_eval_loss", "val_loss");
    if (!mine.length) return null;
    const [x, y] = [(index) => value("train_eval_loss", index), (index) => value("val_loss", index)];
    const losses = mine.map(y).sort((a, b) => a - b);
    const top = frame(losses, true).range?.[1] ?? 1.05 * losses[losses.length - 1];
    const outside = losses.filter((one) => one > top).length;
    const diagonal = line("gap = 0", [0, top], [0, top], token("quiet"), { line: { color: token("quiet"), width: 1, dash: "dot" }, hoverinfo: "skip" });
    return {
      traces: [...byBackbone(mine, x, y), diagonal],
      layout: { xaxis: { title: { text: "loss on training images, without augmentation" }, range: [0, top] }, yaxis: { title: { text: "val_loss" }, range: [0, top] }, annotations: outsideNote(outside, "outside") },
    };
  },

  ends() {
    const { status, epochs, trials: counts } = data.ends;
    const traces = STATUSES.map((one) => {
      const rows = status.map((_, row) => row).filter((row) => status[row] === one);
      const bars = { type: "bar", name: words(one), x: rows.map((row) => epochs[row]), y: rows.map((row) => counts[row]), width: 0.8, marker: { color: token(one) } };
      return rows.length && { ...bars, hovertemplate: `${words(one)} after %{x} epochs: %{y}<extra></extra>` };
    }).filter(Boolean);
    const xaxis = { title: { text: "epochs" }, tickformat: "d", range: [-0.5, data.epochs + 0.5] };
    return { traces, layout: { barmode: "stack", xaxis, yaxis: { title: { text: "trials" }, tickformat: ",d" } }, height: 300 };
  },

  seconds: () => costs("seconds", "training time (s)"),
  size: () => costs("trained_parameters", "trained parameters"),
  parameters: () => costs("parameters", "parameters of the model"),
  latency: () => costs("latency_ms", "latency for one image (ms)"),

  finalists() {
    const { trial_id: ids, difference, low, high } = data.finalists;
    const rows = ids.map((_, row) => row).filter((row) => difference[row] !== null);
    if (!rows.length) return null;
    const bars = { type: "data", symmetric: false, array: rows.map((row) => high[row] - difference[row]), arrayminus: rows.map((row) => difference[row] - low[row]) };
    const zero = { type: "line", x0: 0, x1: 0, yref: "paper", y0: 0, y1: 1, line: { color: token("quiet"), width: 1, dash: "dot" } };
    return {
      traces: [{
        type: "scatter", mode: "markers", x: rows.map((row) => difference[row]), y: rows.map((row) => plain(ids[row])), error_x: { ...bars, thickness: 2, width: 6 },
        marker: { size: 10, color: token("completed") }, text: rows.map((row) => `${shown(low[row])} to ${shown(high[row])}`), hovertemplate: "%{y}: %{x:.4f} (%{text})<extra></extra>",
      }],
      layout: { xaxis: { title: { text: `better than the default by (${metric})` }, zeroline: false }, yaxis: { type: "category", autorange: "reversed", showgrid: false }, shapes: [zero] },
      height: 110 + 44 * rows.length,
    };
  },

  "compared-time": () => comparedRuns("wall_s", timeAxis(Math.max(...data.runs.map((run) => run.end.wall_s)))),
  "compared-epochs": () => comparedRuns("epochs", { scale: (one) => one, title: "epochs trained by all trials" }),
};

function costs(key, title) {
  const mine = withValue(metric, key);
  const front = data.fronts[key].filter((id) => place.has(id)).map((id) => place.get(id));
  const [x, y] = [(index) => value(key, index), (index) => value(metric, index)];
  const joined = { mode: "lines+markers", text: front.map(label), hovertemplate: "%{text}<extra></extra>", marker: { size: 9, color: token("completed") } };
  const { range, outside } = frame(mine.map(y));
  const others = mine.filter((index) => !front.includes(index));
  return {
    traces: [
      points("trials", others, x, y, { color: token("interrupted"), opacity: 0.5, size: 7 }),
      line("Pareto front", front.map(x), front.map(y), token("completed"), joined),
    ],
    layout: { xaxis: { title: { text: title }, type: "log", nticks: 6, exponentformat: "SI" }, yaxis: { title: { text: metric }, range }, annotations: outsideNote(outside) },
  };
}

// ---- drawing

function dressed(layout, height) {
  const axis = { gridcolor: token("line"), linecolor: token("line"), zerolinecolor: token("line"), automargin: true, ticks: "", title: { standoff: 10 } };
  const merged = (mine) => ({ ...axis, ...mine, title: { ...axis.title, ...(mine?.title || {}), font: { size: 12 } } });
  const shades = { paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: token("quiet") } };
  const legend = { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { color: token("ink") } };
  const hoverlabel = { bgcolor: token("page"), bordercolor: token("line"), font: { color: token("ink") }, align: "left" };
  const touch = matchMedia("(pointer: coarse)").matches;
  return {
    ...shades, legend, hoverlabel, hovermode: "closest", dragmode: touch ? false : "zoom", margin: { l: 8, r: 8, t: 16, b: 8 }, ...layout, height,
    xaxis: merged(layout.xaxis), yaxis: merged(layout.yaxis),
  };
}

const CONFIG = { responsive: true, displaylogo: false, displayModeBar: matchMedia("(hover: hover)").matches ? "hover" : false, modeBarButtonsToRemove: ["lasso2d", "select2d", "zoomIn2d", "zoomOut2d"] };
const drawn = new Map();

async function draw(place, make, width) {
  drawn.set(place, make);
  if (!window.DecompressionStream) {
    place.textContent = "This browser is too old to draw the figures.";
    return;
  }
  await loadPlotly();
  const made = await make();
  if (made === null || !made.traces.length) {
    place.hidden = true;
    return;
  }
  const layout = dressed(made.layout, made.height || 360);
  place.style.minHeight = layout.height + "px";
  await Plotly.react(place, made.traces, width ? { ...layout, width } : layout, CONFIG);
  place.dataset.drawn = "yes";
}

const places = [...document.querySelectorAll("[data-figure]")];
const makers = new Map(places.map((one) => [one, figures[one.dataset.figure]]));
const watcher = new IntersectionObserver((entries) => {
  for (const entry of entries.filter((one) => one.isIntersecting)) {
    watcher.unobserve(entry.target);
    draw(entry.target, makers.get(entry.target));
  }
}, { rootMargin: "600px" });
places.forEach((one) => watcher.observe(one));

// What nobody has scrolled to is drawn soon after, figure by figure: printing doesn't wait for drawing.
addEventListener("load", async () => {
  for (const one of places) {
    await new Promise((done) => setTimeout(done, 20));
    watcher.unobserve(one);
    if (!drawn.has(one)) await draw(one, makers.get(one));
  }
});

const redraw = (width) => drawn.forEach((make, one) => one.isConnected && draw(one, make, width));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => redraw());
addEventListener("beforeprint", () => {
  document.documentElement.dataset.print = "yes";
  places.forEach((one) => drawn.set(one, makers.get(one)));
  redraw(680);
});
addEventListener("afterprint", () => {
  delete document.documentElement.dataset.print;
  redraw();
});

// ---- copying

for (const button of document.querySelectorAll("[data-copy]")) {
  button.addEventListener("click", async () => {
    const source = document.getElementById(button.dataset.copy);
    getSelection().selectAllChildren(source);
    try {
      await navigator.clipboard.writeText(source.textContent);
    } catch {
      document.execCommand("copy"); // if the page may not use the clipboard
    }
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = "Copy"), 1500);
  });
}
