// Curves and bars over the steps.
import { h, svg, foreign, number } from "./paint.js";

const WIDTH = 360, HEIGHT = 132, LEFT = 40, RIGHT = 8, TOP = 8, BOTTOM = 14;

// A chart of lines {label, values, colour, dash, thin} or bars, of which the second run's are thin; `log` for a logarithmic axis, `zero` for one that begins at 0.
export function chart(player, { title, note, lines, log = false, bars = false, reference = null, run = player.runs[0] }) {
  const finite = lines.flatMap((line) => line.values).filter((value) => Number.isFinite(value) && value !== null && (!log || value > 0));
  if (!finite.length) return null;
  let low = Math.min(...finite, reference ?? Infinity), high = Math.max(...finite, reference ?? -Infinity);
  if (!log) low = Math.min(0, low);
  if (high === low) high = log ? low * 2 : low + 1;
  if (log && high / low < 2) { const middle = Math.sqrt(high * low); low = middle / 1.5; high = middle * 1.5; }
  const scaled = log ? (v) => Math.log(v / low) / Math.log(high / low) : (v) => (v - low) / (high - low);
  const y = (v) => HEIGHT - BOTTOM - scaled(v) * (HEIGHT - TOP - BOTTOM);
  const inner = WIDTH - LEFT - RIGHT, x = (i) => LEFT + ((i + 0.5) * inner) / player.length;
  const ticks = log ? [low, Math.sqrt(low * high), high] : [low, (low + high) / 2, high];
  const art = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, "aria-hidden": "true", onclick: (event) => seek(event) });
  for (const tick of ticks) art.append(svg("line", { x1: LEFT, x2: WIDTH - RIGHT, y1: y(tick), y2: y(tick), class: "rule" }),
    svg("text", { x: LEFT - 5, y: y(tick) + 3.5, class: "tick" }, number(tick, 2)));
  if (reference !== null) art.append(svg("line", { x1: LEFT, x2: WIDTH - RIGHT, y1: y(reference), y2: y(reference), class: "reference" }));
  run.steps.forEach((step, i) => i && step.stage !== run.steps[i - 1].stage && art.append(svg("line", { x1: x(i - 0.5), x2: x(i - 0.5), y1: TOP, y2: HEIGHT - 4, class: "begins" })));
  run.steps.forEach((step, i) => art.append(svg("rect", { x: x(i) - inner / player.length / 2, y: HEIGHT - 8, width: inner / player.length, height: 4, style: `fill:${player.colour(step.stage)}` })));
  lines.forEach((line, n) => {
    const good = (v) => v !== null && Number.isFinite(v) && (!log || v > 0);
    if (bars) {
      const width = Math.max((0.8 * inner) / player.length / lines.length, 0.6);
      line.values.forEach((v, i) => good(v) && art.append(svg("rect", { x: x(i) - (lines.length * width) / 2 + n * width, width, y: y(v), height: Math.max(y(low) - y(v), 0.5), class: "bar",
        style: `fill:${lines.length > 1 ? line.colour : player.colour(run.steps[i].stage)}` })));
      return;
    }
    let path = "", pen = false;
    line.values.forEach((v, i) => { if (good(v)) { path += `${pen ? "L" : "M"}${x(i).toFixed(2)} ${y(v).toFixed(2)}`; pen = true; } });
    art.append(svg("path", { d: path, class: line.thin ? "curve thin" : "curve", style: `stroke:${line.colour}`, "stroke-dasharray": line.dash ?? null }));
    if (path && !path.includes("L")) line.values.forEach((v, i) => good(v) && art.append(svg("circle", { cx: x(i), cy: y(v), r: 2.5, style: `fill:${line.colour}` })));
  });
  const cursor = svg("line", { y1: TOP, y2: HEIGHT - BOTTOM + 6, class: "cursor" });
  art.append(cursor);
  const values = lines.map(() => h("b", {}));
  const key = lines.map((line, n) => h("span", { class: "key" }, bars && lines.length === 1 ? null : bars ? h("i", { style: `--c:${line.colour}` })
    : svg("svg", { class: "sample", viewBox: "0 0 28 6" }, svg("line", { x1: 0, x2: 28, y1: 3, y2: 3, class: line.thin ? "curve thin" : "curve", style: `stroke:${line.colour}`, "stroke-dasharray": line.dash ?? null })), foreign(line.label), " ", values[n]));
  function seek(event) {
    const box = art.getBoundingClientRect(), share = (((event.clientX - box.left) / box.width) * WIDTH - LEFT) / inner;
    player.play(false);
    player.go(Math.floor(share * player.length));
  }
  player.listeners.push((step) => {
    cursor.setAttribute("x1", x(step));
    cursor.setAttribute("x2", x(step));
    lines.forEach((line, n) => { values[n].textContent = number(line.values[step]); });
  });
  return h("figure", { class: "chart" }, h("figcaption", {}, h("h3", {}, title), h("p", { class: "note" }, log ? `${note}, on a logarithmic axis` : note)), art, h("p", { class: "keys" }, ...key));
}

const DASHES = [null, "9 3", "2 3", "9 3 2 3"]; // so that lines differ without their colours, too
const BANDS = ["longer than 16 latents", "8 to 16", "4 to 8", "shorter than 4"];

export function charts(player, extra = []) {
  const { runs } = player, several = runs.length > 1, name = (run) => (several ? ` ${"AB"[run.number]}` : "");
  const of = (value, label, colour, dash = 0) => runs.map((run) => ({ label: label + name(run), values: run.steps.map(value), colour, dash: DASHES[dash], thin: run.number > 0 }));
  const curve = (key) => (step) => step.curves?.[key] ?? null;
  const ended = runs.every((run) => run.end?.bands);
  const bands = runs.flatMap((run) => BANDS.map((label, band) => ({ label: label + name(run), colour: `var(--c${band})`, dash: DASHES[band], thin: run.number > 0,
    values: run.steps.map((step) => (step.curves?.bands ? step.curves.bands[band] / (ended ? run.end.bands[band] : 1) : null)) })));
  const flows = runs.some((run) => run.steps.some((step) => step.time !== null));
  const cost = (key) => runs.map((run) => ({ label: several ? "AB"[run.number] : "this step", values: run.steps.map((step) => step[key]), colour: `var(--c${run.number})` }));
  return [
    ...extra,
    chart(player, { title: "Energy", note: `standard deviation${flows ? ", of the flow's own canvas" : ""}`, log: true, lines: [...of((step) => step.energy, "canvas", "var(--c1)", 1), ...of(curve("denoised_std"), "estimate", "var(--c0)")] }),
    chart(player, { title: "Spectrum of the estimate", note: ended ? "power by wavelength, the final picture's is 1" : "power by wavelength", log: true, reference: ended ? 1 : null, lines: bands }),
    chart(player, { title: "Disagreement", note: "between what patches or views predict alone, in deviations of the estimate", lines: of(curve("disagreement"), "mean", "var(--c3)") }),
    chart(player, { title: "Guidance", note: "what it adds to the estimate, in deviations of it", lines: of(curve("guidance"), "size", "var(--c2)") }),
    chart(player, { title: "Evaluations", note: "of the network in each step", bars: true, lines: cost("evaluations") }),
    chart(player, { title: "Seconds", note: "of each step, without writing the trace", bars: true, lines: cost("seconds") }),
  ].filter(Boolean);
}

// All numbers once more, for those who read them.
export function table(player) {
  const flows = player.runs.some((run) => run.steps.some((step) => step.time !== null));
  const heads = ["step", "stage", "sigma", ...(flows ? ["t"] : []), "evaluations", "seconds", "canvas", "estimate", ...BANDS, "disagreement", "guidance", "not finite"];
  const rows = player.runs.flatMap((run) => run.steps.map((step) => {
    const { denoised_std, bands, disagreement, guidance, not_finite } = step.curves || {};
    const cells = [step.sigma, ...(flows ? [step.time] : []), step.evaluations, step.seconds, step.energy, denoised_std, ...(bands || [null, null, null, null]), disagreement, guidance, not_finite];
    return h("tr", {}, h("th", { scope: "row" }, `${player.runs.length > 1 ? "AB"[run.number] : ""}${step.number}`), h("td", {}, foreign(step.stage)), ...cells.map((cell) => h("td", {}, number(cell))));
  }));
  return h("details", {}, h("summary", {}, "All numbers"), h("div", { class: "scroll", tabindex: 0 }, h("table", {}, h("thead", {}, h("tr", {}, ...heads.map((text) => h("th", { scope: "col" }, text)))), h("tbody", {}, ...rows))));
}
