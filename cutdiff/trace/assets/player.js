// The step that the page shows, the slider under the time line, and playing.
import { h, svg, foreign, number, count } from "./paint.js";

export class Player {
  constructor(runs) {
    this.runs = runs;
    this.length = Math.max(1, ...runs.map((run) => run.steps.length));
    this.planned = Math.max(this.length, ...runs.map((run) => run.info.num_steps || 0));
    this.step = 0;
    this.timer = null;
    this.listeners = [];
    this.stages = [...new Set(runs.flatMap((run) => run.stages))];
  }

  colour(stage) { return `var(--s${this.stages.indexOf(stage) % 6})`; }

  go(step) {
    this.step = Math.min(Math.max(step, 0), this.length - 1);
    this.slider.value = this.step;
    for (const listener of this.listeners) listener(this.step);
  }

  play(on) {
    clearInterval(this.timer);
    this.timer = null;
    if (on) {
      if (this.step === this.length - 1) this.go(0);
      const pause = Math.min(500, Math.max(120, 9000 / this.length));
      this.timer = setInterval(() => (this.step < this.length - 1 ? this.go(this.step + 1) : this.play(false)), pause);
    }
    const button = document.getElementById("play");
    button.setAttribute("aria-pressed", String(on));
    button.setAttribute("aria-label", on ? "Pause" : "Play");
    button.textContent = on ? "❚❚" : "▶";
  }

  mount() {
    const box = document.getElementById("timeline"), lanes = this.runs.map((run) => this.lane(run));
    this.head = h("div", { class: "playhead", "aria-hidden": "true" });
    this.slider = h("input", { type: "range", id: "slider", min: 0, max: this.length - 1, step: 1, value: 0, "aria-label": "Step", oninput: () => { this.play(false); this.go(Number(this.slider.value)); } });
    const shown = h("div", { class: "reached" }, this.slider, this.head);
    shown.style.width = `${(100 * this.length) / this.planned}%`;
    shown.style.setProperty("--steps", this.length);
    box.append(h("div", { class: "lanes" }, ...lanes), shown);
    document.getElementById("play").addEventListener("click", () => this.play(!this.timer));
    document.addEventListener("keydown", (event) => this.key(event));
    this.listeners.push((step) => this.tell(step));
    this.play(false);
  }

  // One run's steps: a column each, of its stage's colour, and sigma as a line over them.
  lane(run) {
    const steps = run.steps, noise = (step) => step.time ?? Math.log1p((step.sigma || 0) * 8), most = Math.max(...steps.map(noise), 1e-6);
    const y = (step) => 36 - 30 * (noise(step) / most), begins = (step, i) => i > 0 && steps[i - 1].stage !== step.stage;
    const columns = steps.map((step, i) => svg("rect", { x: i + 0.04, y: 0, width: 0.92, height: 40, class: step.isFull ? "cell" : "cell light", style: `fill:${this.colour(step.stage)}` }));
    const bad = steps.flatMap((step, i) => (step.isBad ? [svg("rect", { x: i + 0.04, y: 0, width: 0.92, height: 40, class: "bad" })] : []));
    const line = steps.map((step, i) => `${i ? "L" : "M"}${i + 0.5} ${y(step)}`).join("");
    const art = svg("svg", { viewBox: `0 0 ${this.planned} 40`, preserveAspectRatio: "none", "aria-hidden": "true" },
      ...steps.flatMap((step, i) => (step.isFull ? [] : [svg("rect", { x: i + 0.04, y: 0, width: 0.92, height: 40, class: "under" })])), ...columns,
      ...steps.flatMap((step, i) => (begins(step, i) ? [svg("line", { x1: i, x2: i, y1: 0, y2: 40, class: "begins", "vector-effect": "non-scaling-stroke" })] : [])), ...bad,
      svg("path", { d: line, class: "sigma", "vector-effect": "non-scaling-stroke" }));
    const names = steps.flatMap((step, i) => {
      if (i && !begins(step, i)) return [];
      const name = foreign(step.stage || "no name", { class: "stage" });
      const length = steps.slice(i).findIndex((other) => other.stage !== step.stage);
      name.style.left = `${(100 * i) / this.planned}%`;
      name.style.maxWidth = `${(100 * (length < 0 ? this.planned - i : length)) / this.planned}%`;
      return [name];
    });
    return h("div", { class: "lane" }, art, h("span", { class: "sigma-name" }, steps.some((step) => step.time !== null) ? "t" : "σ"), ...names, this.runs.length > 1 ? h("b", { class: "which" }, "AB"[run.number]) : null);
  }

  key(event) {
    const target = event.target;
    if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
    const moves = { ArrowLeft: this.step - 1, ArrowRight: this.step + 1, Home: 0, End: this.length - 1 };
    if (event.key in moves) { event.preventDefault(); this.play(false); this.go(moves[event.key]); }
    else if (event.key === " " && !target.closest("button, summary, a")) { event.preventDefault(); this.play(!this.timer); }
  }

  tell(i) {
    const words = this.runs.map((run) => {
      const step = run.at(i);
      if (!step) return ["no step was taken"];
      const parts = [`step ${step.number}`, step.stage, step.level, count(step.evaluations, "evaluation"), `${number(step.seconds)} s`];
      const full = run.full(i);
      if (full !== step) parts.push(full ? `pictures of step ${full.number}` : "no pictures");
      return parts.filter(Boolean);
    });
    const lines = words.map((parts, n) => h("span", { class: "line" }, this.runs.length > 1 ? h("b", {}, `${"AB"[n]} `) : null,
      ...parts.flatMap((part, k) => [k ? " · " : "", k === 1 ? foreign(part) : part])));
    document.getElementById("readout").replaceChildren(h("b", { class: "count" }, `${i + 1} / ${this.planned}`), ...lines);
    this.slider.setAttribute("aria-valuetext", words.map((parts) => parts.join(", ")).join("; "));
    this.head.style.left = `${(100 * (i + 0.5)) / this.length}%`;
  }
}
