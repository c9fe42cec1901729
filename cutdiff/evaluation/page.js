/* The page of an evaluation. Whatever comes from the run enters the document as text, never as HTML. */

const data = JSON.parse(document.getElementById("data").textContent);
const $ = (selector, inside = document) => inside.querySelector(selector);
const shares = new Set(data.shares);
const sizes = [...new Set(data.rows.map((row) => row.size))].sort((a, b) => a - b);
const marks = [...new Set(data.seeds.flat().flatMap((picture) => Object.keys(picture?.record.scores ?? {})))];
const columns = [
  { name: "method", of: (row) => row.name },
  { name: "size", of: (row) => row.size },
  ...data.scores.map((name) => ({ name, score: true, of: (row) => row.scores[name]?.map(number)[0] ?? null })),
  ...data.costs.map((name) => ({ name, cost: true, of: (row) => number(row.cost[name] ?? null) })),
  { name: "pictures", of: (row) => row.num },
];
const state = { sort: null, descending: false, words: [], sizes: new Set(sizes), mark: "", seed: 0 };

/** An element with attributes and children; a child that is no element is text. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name.startsWith("--")) element.style.setProperty(name, value);
    else if (value !== false && value !== null) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}

/** A number of the data, in which "NaN" and "Infinity" are names; null stays null. */
function number(value) {
  return value === null ? null : Number(value);
}

function shown(value, name) {
  if (value === null) return "–";
  if (shares.has(name)) return `${(100 * value).toFixed(1)}%`;
  return Math.abs(value) >= 1000 ? value.toFixed(0) : String(Number(value.toPrecision(3)));
}

/** What a score says of one picture, of which a share is a yes or a no. */
function shownOfOne(value, name) {
  return shares.has(name) && (value === 0 || value === 1) ? (value ? "yes" : "no") : shown(value, name);
}

/** A spec, which may break before each of its options. */
function specOf(name) {
  const [thing, ...options] = name.split(/(?=,)/);
  const parts = options.flatMap((option) => [",", make("wbr"), option.slice(1)]);
  return make("bdi", { class: "name" }, thing, make("span", { class: "options" }, ...parts));
}

const title = (row) => `${row.name}, ${row.size} px`;

/* The rows, in their order. */

function isShown(row) {
  const text = title(row).toLowerCase();
  return state.sizes.has(row.size) && state.words.every((word) => text.includes(word));
}

/** The rows in the order of the column that is sorted by; those without a number come last. */
function ordered() {
  const column = columns.find((column) => column.name === state.sort);
  if (column === undefined) return data.rows;
  const missing = (value) => value === null || Number.isNaN(value);
  const sign = state.descending ? -1 : 1;
  return [...data.rows].sort((a, b) => {
    const [x, y] = [column.of(a), column.of(b)];
    if (missing(x) || missing(y)) return missing(x) - missing(y);
    return sign * (typeof x === "string" ? x.localeCompare(y) : x === y ? 0 : x - y);
  });
}

/* The table of scores. */

/** The ends of a column's axis, over the rows that are shown; 0 is on it unless it is far away. */
function axisOf(column) {
  const endsOf = (row) => (column.score ? row.scores[column.name] ?? [] : [column.of(row)]);
  const known = data.rows.filter(isShown).flatMap(endsOf).map(number).filter(Number.isFinite);
  if (known.length === 0) return null;
  let [low, high] = [Math.min(...known), Math.max(...known)];
  if (shares.has(column.name)) [low, high] = [0, 1];
  if (column.cost || low < high / 2) low = Math.min(low, 0);
  if (low === high) high = low + (Math.abs(low) || 1);
  return { low, high, at: (value) => `${(100 * (value - low)) / (high - low)}%` };
}

function cellOf(column, row, axis) {
  const value = column.of(row);
  if (!column.score && !column.cost) {
    return make("td", { class: "plain" }, column.name === "size" ? `${value} px` : String(value));
  }
  if (value === null) return make("td", {}, "–");
  const [, low, high] = column.score ? row.scores[column.name].map(number) : [value, null, null];
  const cell = make("td", {}, make("span", { class: "value" }, shown(value, column.name)));
  if (low !== null && high !== null) {
    const ends = [low, high].map((end) => shown(end, column.name).replace("%", ""));
    cell.append(make("span", { class: "interval" }, `[${ends.join(", ")}]`));
  }
  if (axis && Number.isFinite(value)) cell.append(barOf(column, row, axis, value, low, high));
  return cell;
}

function barOf(column, row, axis, value, low, high) {
  const bar = make("div", { class: "bar", "aria-hidden": "true" });
  const place = (kind, from, to = from) => {
    bar.append(make("i", { class: kind, "--from": axis.at(from), "--to": axis.at(to) }));
  };
  if (column.cost) {
    place("filled", 0, value);
    return bar;
  }
  const truth = data.rows.find((other) => other.truth && other.size === row.size);
  const reference = truth === undefined ? null : column.of(truth);
  if (reference !== null && Number.isFinite(reference)) place("reference", reference);
  if (Number.isFinite(low ?? NaN) && Number.isFinite(high ?? NaN)) place("between", low, high);
  place("dot", value);
  return bar;
}

function fillScores() {
  const axes = new Map(columns.filter(({ score, cost }) => score || cost).map((column) => [column, axisOf(column)]));
  const heads = columns.map((column) => {
    const sorted = state.sort === column.name ? (state.descending ? "descending" : "ascending") : "none";
    const title = data.meanings[column.name] ?? null;
    const button = make("button", { type: "button", "data-column": column.name, title }, column.name);
    const axis = axes.get(column);
    const head = make("th", { scope: "col", "aria-sort": sorted, class: axes.has(column) ? null : "plain" }, button);
    if (axis) {
      const ends = [axis.low, axis.high].map((end) => make("span", {}, shown(end, column.name).replace(".0%", "%")));
      head.append(make("div", { class: "axis", "aria-hidden": "true" }, ...ends));
    }
    return head;
  });
  const rows = ordered().filter(isShown).map((row) => {
    const name = make("button", { type: "button", onclick: () => showRecord(row) }, specOf(row.name));
    const cells = columns.slice(1).map((column) => cellOf(column, row, axes.get(column)));
    return make("tr", { class: row.truth ? "truth" : null }, make("th", { scope: "row" }, name), ...cells);
  });
  const sorted = document.activeElement?.dataset.column;
  $("#scores").replaceChildren(make("thead", {}, make("tr", {}, ...heads)), make("tbody", {}, ...rows));
  if (sorted) $(`[data-column="${CSS.escape(sorted)}"]`).focus();
  $("#filter output").textContent = `${rows.length} of ${data.rows.length} rows`;
}

/** Sort by a column: ascending, then descending, then as the evaluation has them. */
function sortBy(name) {
  if (state.sort !== name) Object.assign(state, { sort: name, descending: false });
  else if (!state.descending) state.descending = true;
  else state.sort = null;
  fill();
}

/* The contact sheet: a row for each method and size, a column for each seed. */

const picturesOf = (row) => data.seeds.map((pictures) => pictures[data.rows.indexOf(row)]);
const rowsWithPictures = () => ordered().filter((row) => isShown(row) && picturesOf(row).some(Boolean));
const firstOf = (seed) => data.seeds[seed].find(Boolean).record;
const sourceOf = (picture) => `data:image/webp;base64,${picture.webp}`;

function markOf(picture) {
  const value = picture.record.scores[state.mark];
  if (value === undefined) return "";
  const text = shownOfOne(number(value), state.mark);
  return make("span", { class: `mark ${text === "yes" || text === "no" ? text : ""}` }, text);
}

/** The rows of the sheet that were made once: thousands of pictures are not decoded anew for each key in the filter. */
const sheetRows = new Map();

function fillSheet() {
  const heads = data.seeds.map((_, i) => {
    const { seed, caption } = firstOf(i);
    return make("th", { scope: "col" }, `seed ${seed}`, make("bdi", { title: caption }, caption));
  });
  const rows = rowsWithPictures().map((row) => {
    if (!sheetRows.has(row)) sheetRows.set(row, sheetRow(row));
    return sheetRows.get(row);
  });
  const head = make("tr", {}, make("th", { scope: "col" }, "method"), ...heads);
  $("#sheet").replaceChildren(make("thead", {}, head), make("tbody", {}, ...rows));
  takeTurn($("#sheet button"));
}

function sheetRow(row) {
  const cells = picturesOf(row).map((picture, seed) => {
    if (!picture) return make("td");
    const label = `${title(row)}, seed ${picture.record.seed}: enlarge`;
    const image = make("img", { src: sourceOf(picture), alt: "", decoding: "async" });
    const button = make("button", { type: "button", tabindex: "-1", "aria-label": label, "data-seed": seed }, image);
    button.addEventListener("click", () => showZoom(seed, row));
    return make("td", {}, button, markOf(picture));
  });
  const head = make("th", { scope: "row" }, specOf(row.name), make("div", { class: "size" }, `${row.size} px`));
  return make("tr", { "data-row": data.rows.indexOf(row) }, head, ...cells);
}

/** Move the focus through the sheet, of which one picture at a time is in the order of the Tab key. */
function walk(event) {
  const button = event.target.closest("td button");
  const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
  if (!button || !step) return;
  event.preventDefault();
  const cell = button.parentElement;
  const line = cell.parentElement;
  const next = line.parentElement.rows[line.sectionRowIndex + step[0]]?.cells[cell.cellIndex + step[1]];
  if (next) takeTurn($("button", next))?.focus();
}

/** Make a picture the one that the Tab key goes to. */
function takeTurn(button) {
  if (!button) return null;
  for (const other of document.querySelectorAll('#sheet button[tabindex="0"]')) other.tabIndex = -1;
  button.tabIndex = 0;
  return button;
}

/* One seed, large, by all methods. */

function showZoom(seed, row) {
  state.seed = seed;
  state.row = row;
  if (!$("#zoom").open) $("#zoom").showModal();
  const record = firstOf(seed);
  $("#zoom-title").textContent = `Seed ${record.seed}`;
  $("#zoom bdi").textContent = record.caption;
  $('[data-step="-1"]').ariaDisabled = seed === 0;
  $('[data-step="1"]').ariaDisabled = seed === data.seeds.length - 1;
  const rows = rowsWithPictures().filter((other) => picturesOf(other)[seed]);
  $("#zoom .figures").replaceChildren(...rows.map((other) => figureOf(other, picturesOf(other)[seed], other === row)));
  fitFigures();
  $("figure.chosen")?.scrollIntoView({ block: "nearest" });
}

function figureOf(row, picture, chosen) {
  const { width, height, caption } = picture.record;
  const image = make("img", { src: sourceOf(picture), width, height, alt: `${caption}, by ${title(row)}` });
  const name = make("span", {}, specOf(row.name), " ", make("span", { class: "size" }, `${row.size} px`));
  const record = make("button", { type: "button", "aria-label": `Record of ${title(row)}` }, "Record");
  record.addEventListener("click", () => showRecord(row, picture));
  const label = `PNG of ${title(row)}, ${width} by ${height} pixels`;
  const file = make("a", { href: picture.href, target: "_blank", "aria-label": label }, "PNG");
  const said = make("figcaption", {}, name, markOf(picture), record, file);
  return make("figure", { class: chosen ? "chosen" : null }, image, said);
}

/** Choose the number of columns that shows the pictures largest without scrolling, but none smaller than 220 px. */
function fitFigures() {
  const area = $("#zoom .figures");
  const count = area.children.length;
  const most = Math.max(1, Math.floor(area.clientWidth / 240));
  const height = (columns) => (area.clientHeight - 16) / Math.ceil(count / columns) - 70;
  const side = (columns) => Math.min(area.clientWidth / columns, height(columns));
  const choices = Array.from({ length: Math.min(most, count) }, (_, i) => i + 1);
  const best = choices.reduce((a, b) => (side(b) > side(a) ? b : a), 1);
  area.style.setProperty("--columns", side(best) < 220 ? Math.min(most, count) : best);
}

function step(by) {
  const seed = state.seed + by;
  if (seed >= 0 && seed < data.seeds.length) showZoom(seed, state.row);
}

/* The record of a picture, or of a row. */

/** The most values of a setting that are listed with the rows that have them. */
const MOST_NAMED = 4;

function showRecord(row, picture) {
  $("#record-title").replaceChildren(make("bdi", {}, title(row)), picture ? `, seed ${picture.record.seed}` : "");
  const others = data.rows.filter((other) => other !== row && other.size === row.size && !other.truth);
  const lines = Object.entries(row.options).flatMap(([name, value]) => {
    const differing = others.filter((other) => (other.options[name] ?? value) !== value);
    const elsewhere = Map.groupBy(differing, (other) => other.options[name]);
    if (elsewhere.size === 0) return [];
    const few = elsewhere.size <= MOST_NAMED;
    const cells = [...elsewhere].map(([other, rows], i) => {
      const names = make("bdi", {}, rows.map((row) => row.name).join("; "));
      const where = few ? [" in ", names] : i < elsewhere.size - 1 ? [", "] : [];
      return make(few ? "div" : "span", {}, make("b", {}, make("bdi", {}, other)), ...where);
    });
    const here = make("td", {}, make("bdi", {}, value));
    return [make("tr", {}, make("th", { scope: "row" }, make("bdi", {}, name)), here, make("td", {}, ...cells))];
  });
  const heads = ["setting", "here", "elsewhere"].map((name) => make("th", { scope: "col" }, name));
  $("#record table").replaceChildren(make("thead", {}, make("tr", {}, ...heads)), make("tbody", {}, ...lines));
  $("#record .wide").hidden = lines.length === 0;
  const none = "No other row of this size has another value of a setting of this one.";
  $("#record .note").textContent = lines.length ? "" : none;
  const { cost, scores } = row;
  const whole = { ...(picture ? picture.record : { scores }), ...row.cell, cost, run: data.run };
  $("#record pre").textContent = JSON.stringify(whole, null, 2);
  $("#record .body").scrollTop = 0;
  $("#record").showModal();
}

/* The whole page. */

/** Say how many columns of a table are to the right of what is seen of it, and shade its edge there. */
function tellMore(wide) {
  const end = wide.getBoundingClientRect().left + wide.clientLeft + wide.clientWidth;
  const heads = [...$("thead tr", wide)?.cells ?? []];
  const hidden = heads.filter((head) => head.getBoundingClientRect().right > end + 1).length;
  const more = wide.parentElement.previousElementSibling;
  wide.parentElement.classList.toggle("right", hidden > 0);
  more.hidden = hidden === 0;
  more.textContent = `${hidden} more ${hidden > 1 ? "columns" : "column"} to the right: scroll, or use the arrow keys →`;
}

function tellAllMore() {
  document.querySelectorAll(".edge > .wide").forEach(tellMore);
}

function fill() {
  fillScores();
  fillSheet();
  tellAllMore();
}

function start() {
  const methods = new Set(data.rows.filter((row) => !row.truth).map((row) => row.name)).size;
  $("h1").textContent = data.title;
  const { source, dtype, device, notice } = data.run;
  const { num_steps: steps, solver, guidance } = data.run["settings of all rows"];
  const how = [steps && `${steps} steps`, solver, guidance];
  const facts = [`${methods} methods`, `${data.drawn} pictures each`, source, ...how, dtype, device].filter(Boolean);
  $("#notice").textContent = notice ?? "";
  $("#notice").hidden = !notice;
  $("#facts").append(...facts.flatMap((fact) => [" · ", make("bdi", {}, fact)]).slice(1));
  $("#run pre").textContent = JSON.stringify(data.run, null, 2);
  const known = columns.filter((column) => data.meanings[column.name]);
  $("#meanings dl").append(...known.flatMap(({ name }) => [make("dt", {}, name), make("dd", {}, data.meanings[name])]));
  for (const size of sizes) {
    const change = (event) => (event.target.checked ? state.sizes.add(size) : state.sizes.delete(size), fill());
    const box = make("input", { type: "checkbox", checked: true, onchange: change });
    $("#filter fieldset").append(make("label", {}, box, `${size} px`));
  }
  $("#filter fieldset").hidden = sizes.length < 2;
  $("#filter").addEventListener("submit", (event) => event.preventDefault());
  $("#filter input").addEventListener("input", (event) => {
    state.words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
    fill();
  });
  state.mark = marks.includes("one of each") ? "one of each" : "";
  const optionOf = (name) => make("option", { value: name, selected: name === state.mark }, name || "nothing");
  $("#mark select").append(...["", ...marks].map(optionOf));
  $("#mark select").addEventListener("change", (event) => {
    state.mark = event.target.value;
    sheetRows.clear();
    fillSheet();
  });
  $("#mark").hidden = marks.length === 0;
  const [few, all] = [data.seeds.length, data.drawn];
  $("#pictures-title ~ .note").prepend(few < all ? `The first ${few} of ${all} seeds. ` : `All ${all} seeds. `);
  $("#scores").addEventListener("click", (event) => {
    const button = event.target.closest("thead button");
    if (button) sortBy(button.dataset.column);
  });
  $("#sheet").addEventListener("keydown", walk);
  $("#zoom").addEventListener("keydown", ({ key }) => step({ ArrowLeft: -1, ArrowRight: 1 }[key] ?? NaN));
  $("#zoom").addEventListener("close", () => {
    takeTurn($(`[data-row="${data.rows.indexOf(state.row)}"] [data-seed="${state.seed}"]`))?.focus();
  });
  for (const button of document.querySelectorAll("[data-step]")) {
    button.addEventListener("click", () => step(Number(button.dataset.step)));
  }
  for (const button of document.querySelectorAll("[data-close]")) {
    button.addEventListener("click", () => button.closest("dialog").close());
  }
  for (const wide of document.querySelectorAll(".edge > .wide")) wide.addEventListener("scroll", () => tellMore(wide));
  addEventListener("resize", () => {
    tellAllMore();
    if ($("#zoom").open) fitFigures();
  });
  fill();
}

start();
