// Draws the figures and the table of trials from the page's own JSON. Whatever a run holds is shown by textContent, or
// through `plain` where Plotly would read it as markup.
"use strict";

const data = JSON.parse(document.getElementById("packed-data").textContent);
const STATUSES = ["completed", "converged", "stopped", "diverged", "out_of_memory", "failed", "running", "interrupted"];
const SYMBOLS = ["circle", "diamond", "square", "x", "triangle-up", "cross", "star", "triangle-down"];
const PAGE = 50; // rows of the table
const MEASURED = /second|_s$|_ms$|_mb$/; // seconds, images a second, milliseconds, megabytes
const letters = new Intl.Collator("en"); // localeCompare is many times slower
const POINTS = 15000; // of the learning curves; every second epoch, or third, where there are more
const trials = data.trials || {};
const metric = data.metric;
const all = (data.ids || []).map((_, index) => index);
const place = new Map((data.ids || []).map((id, index) => [id, index]));
const searched = all.filter((index) => !["probe", "finalist"].includes(trials.origin[index]));
const configs = data.varied || []; // columns of what was not the same in all trials

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

// Configurations span decades, and are not read down a column digit by digit; of times nobody wants milliseconds.
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

// ---- figures: each returns traces, layout and height, or null where there is nothing to draw

function timeAxis(longest) {
  const [seconds, unit] = longest > 2 * 3600 ? [3600, "hours"] : longest > 120 ? [60, "minutes"] : [1, "seconds"];
  return { scale: (one) => (one === null ? null : one / seconds), title: unit + " since the search began" };
}

// The range of an axis without its outliers, and how many those are: one diverged trial would flatten all others.
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

function told(outside, where = data.lower ? "above" : "below") {
  if (!outside) return [];
  const text = `${outside} ${where}: double click shows all`;
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
      layout: { xaxis: { title: { text: axis.title } }, yaxis: { title: { text: metric }, range }, annotations: told(outside) },
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
    const some = mine.length < searched.length ? ` (${mine.length} of ${searched.length} trials, the best among them)` : "";
    return {
      traces,
      layout: { xaxis: { title: { text: "epoch" + some } }, yaxis: { title: { text: metric }, range }, annotations: told(outside) },
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
    return { traces, layout: { xaxis, yaxis: { title: { text: metric }, range }, annotations: told(outside) } };
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
    const hover = cells.map((cell) => cell.map((row) => at(row, (one) => `${plain(backbone[one])}, depth ${depth[one]}<br>best ${ids[one] ?? "none"} of ${counts[one]} trials`, "never tried")));
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
    const diagonal = line("no gap", [0, top], [0, top], token("quiet"), { line: { color: token("quiet"), width: 1, dash: "dot" }, hoverinfo: "skip" });
    const note = told(outside, "outside");
    return {
      traces: [...byBackbone(mine, x, y), diagonal],
      layout: { xaxis: { title: { text: "loss on training images" }, range: [0, top] }, yaxis: { title: { text: "val_loss" }, range: [0, top] }, annotations: note },
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

  seconds: () => costs("seconds", "seconds"),
  size: () => costs("trained_parameters", "trained parameters"),
  parameters: () => costs("parameters", "parameters of the model"),
  latency: () => costs("latency_ms", "ms for one image"),

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
  "compared-epochs": () => comparedRuns("epochs", { scale: (one) => one, title: "epochs trained, of all trials" }),
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
    layout: { xaxis: { title: { text: title }, type: "log", nticks: 6, exponentformat: "SI" }, yaxis: { title: { text: metric }, range }, annotations: told(outside) },
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
    place.textContent = "This browser is too old for the figures.";
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
      document.execCommand("copy"); // where the page may not use the clipboard
    }
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = "Copy"), 1500);
  });
}

// ---- the table of all trials

const view = { key: null, descending: false, text: "", status: "", page: 0, open: new Set() };

function tableOfTrials(home) {
  const keys = ["trial_id", "status", metric, ...["val_accuracy", "gap"].filter((key) => key !== metric), "epochs", "seconds", ...configs, "origin", "reason"];
  const names = { trial_id: "trial", config_learning_rate: "lr", config_unfreeze_depth: "unfrozen" };
  const numeric = new Set(keys.filter((key) => finite(trials[key]).every((one) => typeof one === "number")));
  const hay = all.map((index) => keys.map((key) => value(key, index) ?? "").join(" ").toLowerCase());

  const search = element("input", { type: "search", placeholder: "Filter: words of any column", "aria-label": "Filter trials" });
  const status = element("select", { "aria-label": "How trials ended" }, new Option("all statuses", ""));
  for (const one of STATUSES.filter((name) => trials.status.includes(name))) status.append(new Option(words(one), one));
  const count = element("span", { class: "count", role: "status" });
  const heads = keys.map((key) => {
    const button = element("button", { type: "button" }, names[key] || words(key));
    const head = element("th", { scope: "col", "data-key": key, ...(numeric.has(key) ? { class: "number" } : {}) }, button);
    button.addEventListener("click", () => {
      view.descending = view.key === key && !view.descending;
      Object.assign(view, { key, page: 0 });
      show();
    });
    return head;
  });
  const body = element("tbody");
  const scroll = element("div", { class: "scroll" }, element("table", { class: "trials" }, element("thead", {}, element("tr", {}, ...heads)), body));
  const [back, next] = ["Previous", "Next"].map((name) => element("button", { type: "button" }, name));
  const pages = element("div", { class: "controls pages" }, back, next);
  home.append(element("div", { class: "controls" }, search, status, count), scroll, pages);
  new ResizeObserver(() => scroll.style.setProperty("--visible", scroll.clientWidth + "px")).observe(scroll);

  const turn = (change) => { Object.assign(view, change); show(); };
  search.addEventListener("input", () => turn({ text: search.value, page: 0 }));
  status.addEventListener("change", () => turn({ status: status.value, page: 0 }));
  back.addEventListener("click", () => turn({ page: view.page - 1 }));
  next.addEventListener("click", () => turn({ page: view.page + 1 }));

  function chosen() {
    const wanted = view.text.toLowerCase().split(/\s+/).filter(Boolean);
    const found = all.filter((index) => wanted.every((word) => hay[index].includes(word)) && (!view.status || value("status", index) === view.status));
    if (view.key === null) return found; // as they come: the best first
    const way = view.descending ? -1 : 1;
    return found.sort((a, b) => {
      const [one, other] = [value(view.key, a), value(view.key, b)];
      if (one === null || other === null) return (one === null) - (other === null); // missing ones last, either way
      return way * (numeric.has(view.key) ? one - other : letters.compare(String(one), String(other)));
    });
  }

  function show() {
    const found = chosen();
    const from = view.page * PAGE;
    heads.forEach((head) => {
      if (head.dataset.key === view.key) head.setAttribute("aria-sort", view.descending ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    });
    body.replaceChildren(...found.slice(from, from + PAGE).flatMap(rows));
    const many = found.length > PAGE;
    count.textContent = many ? `${from + 1}–${Math.min(from + PAGE, found.length)} of ${found.length.toLocaleString("en")}` : `${found.length} trials`;
    pages.hidden = !many;
    [back.disabled, next.disabled] = [view.page === 0, from + PAGE >= found.length];
  }

  function rows(index) {
    const button = element("button", { type: "button", class: "id", "data-id": data.ids[index], "aria-expanded": String(view.open.has(index)) }, data.ids[index]);
    const cells = keys.map((key) => {
      const made = element("td", numeric.has(key) ? { class: "number" } : {});
      if (key === "trial_id") made.append(button);
      else if (key === "status") made.append(dot(value(key, index)), words(value(key, index)));
      else made.textContent = cell(key, value(key, index));
      if (key === "reason") { made.className = "reason"; made.title = value(key, index) ?? ""; }
      return made;
    });
    const row = element("tr", { class: view.open.has(index) ? "trial open" : "trial" }, ...cells);
    row.addEventListener("click", () => {
      if (String(getSelection())) return; // someone selects text
      view.open.has(index) ? view.open.delete(index) : view.open.add(index);
      show();
      body.querySelector(`[data-id="${data.ids[index]}"]`)?.focus({ preventScroll: true });
    });
    return view.open.has(index) ? [row, historyRow(index, keys.length)] : [row];
  }

  show();
}

function dot(status) {
  const made = element("span", { class: "dot", "aria-hidden": "true" });
  made.style.background = `var(--${status})`;
  return made;
}

function historyRow(index, span) {
  const inside = element("div", { class: "inside" });
  fillHistory(inside, index);
  return element("tr", { class: "history", "data-of": data.ids[index] }, element("td", { colspan: span }, inside));
}

async function fillHistory(inside, index) {
  const id = data.ids[index];
  inside.append(element("p", {}, `${words(value("status", index))}: ${value("reason", index) ?? "no reason yet"}`));
  const facts = Object.keys(trials).filter((key) => !["trial_id", "status", "reason"].includes(key) && value(key, index) !== null);
  inside.append(element("dl", {}, ...facts.map((key) => element("div", {}, element("dt", {}, words(key)), element("dd", {}, cell(key, value(key, index)))))));
  const { epochs, decisions, errors } = await loadHistory();
  if (errors[id]) inside.append(element("pre", { class: "error" }, errors[id]));
  const rows = epochs.trials[id];
  if (!rows) {
    inside.append(element("p", { class: "note" }, "Its epochs are not in this page; see epochs.parquet."));
    return;
  }
  const figure = element("div", { class: "figure" });
  inside.append(figure, plainTable(epochs.columns, rows));
  if (decisions.trials[id]) inside.append(element("p", {}, "How it was judged"), plainTable(decisions.columns, decisions.trials[id]));
  if (inside.isConnected) await draw(figure, () => curvesOf(epochs.columns, rows));
}

function curvesOf(columns, rows) {
  const wanted = [["val_loss", "completed"], ["train_eval_loss", "stopped"], ["train_loss", "interrupted"]];
  if (metric !== "val_loss") wanted.unshift([metric, "converged"]);
  const traces = wanted.filter(([key]) => columns.includes(key)).map(([key, colour]) => {
    const more = { mode: "lines+markers", hovertemplate: `${key} %{y:.4f} at epoch %{x}<extra></extra>`, marker: { size: 5 } };
    return line(key, rows[columns.indexOf("epoch")], rows[columns.indexOf(key)], token(colour), more);
  });
  return { traces, layout: { xaxis: { title: { text: "epoch" }, tickformat: "d" } }, height: 260 };
}

function plainTable(columns, rows) {
  const kinds = rows.map((column) => (finite(column).every((one) => typeof one === "number") ? { class: "number" } : {}));
  const heads = columns.map((name, place) => element("th", { scope: "col", ...kinds[place] }, words(name)));
  const cells = (row) => rows.map((column, place) => element("td", kinds[place], cell(columns[place], column[row])));
  const lines = rows[0].map((_, row) => element("tr", {}, ...cells(row)));
  return element("div", { class: "scroll" }, element("table", {}, element("thead", {}, element("tr", {}, ...heads)), element("tbody", {}, ...lines)));
}

const home = document.getElementById("table");
if (home) tableOfTrials(home);
