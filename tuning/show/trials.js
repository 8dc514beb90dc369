
// ---- the table of all trials, whose rows open a trial's history

const PAGE = 50; // rows of the table
const letters = new Intl.Collator("en"); // localeCompare is many times slower
const view = { key: null, descending: false, text: "", status: "", page: 0, open: new Set() };

function tableOfTrials(home) {
  const keys = ["trial_id", "status", metric, ...["val_accuracy", "gap"].filter((key) => key !== metric), "epochs", "seconds", ...configs, "origin", "reason"];
  const names = { trial_id: "trial", config_learning_rate: "lr", config_unfreeze_depth: "unfrozen" };
  const numeric = new Set(keys.filter((key) => finite(trials[key]).every((one) => typeof one === "number")));
  const hay = all.map((index) => keys.map((key) => value(key, index) ?? "").join(" ").toLowerCase());

  const search = element("input", { type: "search", placeholder: "Filter: words in any column", "aria-label": "Filter trials" });
  const status = element("select", { "aria-label": "Status" }, new Option("all statuses", ""));
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
    if (view.key === null) return found; // the best first
    const way = view.descending ? -1 : 1;
    return found.sort((a, b) => {
      const [one, other] = [value(view.key, a), value(view.key, b)];
      if (one === null || other === null) return (one === null) - (other === null); // missing values last in either order
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
    count.textContent = many ? `${from + 1}–${Math.min(from + PAGE, found.length)} of ${found.length.toLocaleString("en")}` : `${found.length} ${found.length === 1 ? "trial" : "trials"}`;
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
  inside.append(element("p", {}, `${words(value("status", index))}: ${value("reason", index) ?? "not ended yet"}`));
  const facts = Object.keys(trials).filter((key) => !["trial_id", "status", "reason"].includes(key) && value(key, index) !== null);
  inside.append(element("dl", {}, ...facts.map((key) => element("div", {}, element("dt", {}, words(key)), element("dd", {}, cell(key, value(key, index)))))));
  const { epochs, decisions, errors } = await loadHistory();
  if (errors[id]) inside.append(element("pre", { class: "error" }, errors[id]));
  const rows = epochs.trials[id];
  if (!rows) {
    inside.append(element("p", { class: "note" }, "The epochs of this trial are only in epochs.parquet."));
    return;
  }
  const figure = element("div", { class: "figure" });
  inside.append(figure, plainTable(epochs.columns, rows));
  if (decisions.trials[id]) inside.append(element("p", {}, "Early-stopping decisions"), plainTable(decisions.columns, decisions.trials[id]));
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
