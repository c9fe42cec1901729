// The page: its head, its parts, and what went wrong.
import { readRuns, parting, apart, incomparable, unlike } from "./runs.js";
import { Player } from "./player.js";
import { Panels, Difference } from "./panels.js";
import { Patches } from "./patches.js";
import { Views, Others } from "./views.js";
import { Words } from "./words.js";
import { chart, charts, table } from "./charts.js";
import { h, foreign, number, count, choice } from "./paint.js";

function headOf(run, several) {
  const { info, end } = run, { settings } = info, [height, width] = info.size.map((side) => side * info.factor);
  const spent = end?.record ? [count(end.record.network_evaluations, "evaluation"), `${number(Object.values(end.record.seconds).reduce((a, b) => a + b, 0))} s with its trace`] : [];
  const { method, solver, schedule, guidance } = info.chosen;
  const facts = [method, `${width} × ${height} px`, count(info.num_steps, "step"), solver, `schedule ${schedule}`, guidance, `seed ${settings.seed}`, `model ${info.model}`, ...spent];
  return h("div", { class: "about" }, several ? h("b", { class: "which" }, "AB"[run.number]) : null,
    h(several ? "h2" : "h1", { class: "prompt" }, info.prompt ? foreign(info.prompt) : "no prompt"),
    settings.negative_prompt ? h("p", { class: "negative" }, "without ", foreign(settings.negative_prompt)) : null,
    h("ul", { class: "facts" }, ...facts.map((fact) => h("li", {}, foreign(String(fact))))));
}

function noticesOf(run, player) {
  const notices = [], which = player.runs.length > 1 ? `Run ${"AB"[run.number]}: ` : "", last = run.steps.length;
  const go = (i, text) => h("button", { type: "button", onclick: () => player.go(i) }, text);
  const after = last ? `${run.steps[last - 1].failed ? "in" : "after"} step ${last} of ${run.info.num_steps}` : "before its first step was recorded";
  if (!run.end) notices.push(h("p", { class: "notice cut" }, `${which}The page ends ${after}: the run was killed, or still goes on (then load the page again).`));
  else if (run.end.state !== "finished") notices.push(h("p", { class: "notice failed" }, `${which}The run ended ${after}${run.steps[last - 1]?.failed ? ", in the words of its error, which counts the schedule's steps from 0" : ""}: `, foreign(run.end.message), "."));
  const bad = run.firstBad;
  if (bad >= 0) {
    const step = run.steps[bad], items = step.items.find((each) => each.not_finite.some(Boolean));
    const where = items ? `first in ${{ patches: "patch", views: "view" }[items.kind] || "item"} ${items.not_finite.findIndex(Boolean) + 1} of ${items.number}` : step.badIn("state") ? "in the canvas" : "in the estimate of x0, which the method made of what the network gave, all of it finite";
    notices.push(h("p", { class: "notice failed" }, `${which}NaN or infinity begins in step ${step.number}${step.stage ? ` (${step.stage})` : ""}, ${where}. `, go(bad, "Show it")));
  }
  return notices;
}

function compare(player, [a, b], between) {
  const why = incomparable(a, b, between);
  if (why) return h("p", { class: "notice parted", id: "parting" }, why);
  const first = parting(a, b, between), step = (i) => h("button", { type: "button", onclick: () => player.go(i) }, `step ${i + 1}`), text = [];
  if (first.state === null && first.denoised === null) text.push("The runs are the same, to the bit, in all steps that both have.");
  else if (first.state !== null && (first.denoised === null || first.state <= first.denoised)) text.push("The runs part with the canvas of ", step(first.state), first.state ? ": up to there they are the same to the bit." : ", their first.");
  else text.push("The runs part with the estimate of ", step(first.denoised), ": its canvas is still the same to the bit.");
  const light = first.share && between.denoised[first.share - 1] === null && first.share !== first.denoised;
  if (first.share !== null) text.push(light ? " At the latest from " : " From ", step(first.share), " on their estimates are more than 1% apart.");
  const other = unlike(a, b);
  if (other !== null) text.push(" They are compared step by step, although their noise differs: at ", step(other), ` run A is at ${a.steps[other].level}, run B at ${b.steps[other].level}.`);
  if (a.steps.length !== b.steps.length) text.push(` Run A has ${count(a.steps.length, "step")}, run B ${count(b.steps.length, "step")}.`);
  return h("p", { class: "notice parted", id: "parting", "data-state": first.state, "data-denoised": first.denoised }, ...text);
}

function theme() {
  const dark = () => (document.documentElement.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  document.getElementById("theme").addEventListener("click", () => { document.documentElement.dataset.theme = dark() ? "light" : "dark"; });
}

function start() {
  const runs = readRuns(), main = document.getElementById("main"), several = runs.length > 1;
  theme();
  document.getElementById("runs").append(...runs.map((run) => headOf(run, several)));
  const notices = document.getElementById("notices");
  if (!runs.length) { notices.append(h("p", { class: "notice cut" }, "The page ends before the run began.")); return; }
  const player = new Player(runs);
  player.mount();
  const between = several ? apart(...runs) : null;
  notices.append(...(several ? [compare(player, runs, between)] : []), ...runs.flatMap((run) => noticesOf(run, player)));
  if (!runs.some((run) => run.steps.length)) return;
  const panels = runs.map((run) => new Panels(player, run));
  main.append(h("section", { id: "pictures", "aria-label": "Pictures of this step", class: several ? "compare" : "" }, ...panels.map((each) => each.element), several && !incomparable(...runs, between) ? new Difference(player, runs).element : null));
  const inside = runs.map((run, n) => h("div", { class: "inside", hidden: n > 0 }, ...[Patches, Views, Others].map((Part) => new Part(player, run).element), new Words(player, run, panels[n]).element));
  if (several) main.append(h("div", { class: "which-run" }, "Inside of run ", choice("Run", runs.map((run, n) => [n, "AB"[n]]), 0, (n) => inside.forEach((each, k) => { each.hidden = k !== n; }))));
  main.append(...inside);
  const extra = several ? [chart(player, { title: "Distance between the runs", note: "relative to run A", lines: [{ label: "canvas", values: between.state, colour: "var(--c1)", dash: "9 3" }, { label: "estimate", values: between.denoised, colour: "var(--c0)" }] })] : [];
  main.append(h("section", { id: "curves", class: "card" }, h("header", {}, h("h2", {}, "Over the steps")), h("div", { class: "charts" }, ...charts(player, extra)), table(player)));
  player.go(Number(location.hash.replace("#step-", "")) - 1 || 0);
}

start();
