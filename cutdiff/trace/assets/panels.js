// The pictures of a step: the canvas, the estimate, the change since the step before, and the finished picture.
import { same, distance, rms, greatest } from "./tensors.js";
import { pictureOf, heatOf, through } from "./colours.js";
import { h, Frame, choice, number, count } from "./paint.js";
import { bothFull } from "./runs.js";

export class Panels {
  constructor(player, run) {
    this.player = player;
    this.run = run;
    this.of = "denoised";
    this.word = null;
    this.canvas = new Frame("Canvas");
    this.estimate = new Frame("Estimate of x0");
    this.change = new Frame("Change");
    this.final = new Frame("Picture");
    const which = choice("Change of", [["denoised", "estimate"], ["state", "canvas"]], this.of, (value) => { this.of = value; this.draw(player.step); });
    this.change.element.querySelector("figcaption").insertBefore(which, this.change.note);
    const name = player.runs.length > 1 ? h("h3", { class: "run" }, h("b", { class: "which" }, "AB"[run.number]), ` ${run.info.chosen.method}`) : null;
    this.element = h("div", { class: "run-panels" }, name, h("div", { class: "panels" }, ...[this.canvas, this.estimate, this.change, this.final].map((frame) => frame.element)));
    player.listeners.push((step) => this.draw(step));
    const picture = run.end?.picture;
    this.final.show(picture || null, picture ? "" : "the run has none", picture ? `The finished picture of the prompt: ${run.info.prompt}` : "");
  }

  draw(i) {
    const { run } = this, step = run.full(i);
    if (!step) { for (const frame of [this.canvas, this.estimate, this.change]) frame.show(null, "nothing was recorded"); return; }
    const state = step.tensor("state"), estimate = step.tensor("denoised"), before = run.fullBefore(run.steps.indexOf(step));
    const broken = (name) => { const bad = step.badIn(name); return bad ? `${count(bad, "value")} not finite` : ""; };
    this.canvas.show(state && pictureOf(state, run.map, step.scale), broken("state") || step.level);
    const map = this.word === null ? null : step.tensor("attention");
    if (step.decoded && !map) this.estimate.show(step.decoded, "decoded", `The estimate of x0 at step ${step.number}`);
    else {
      const picture = estimate && pictureOf(estimate, run.map);
      const shown = map && picture ? through(picture, wordMap(map, this.word)) : picture;
      this.estimate.show(shown, broken("denoised") || (map ? `attention over “${run.info.words[this.word]}”` : "linear preview"));
    }
    const [now, then] = [step, before].map((each) => each?.tensor(this.of));
    if (!same(now, then)) { this.change.show(null, then ? "the canvas has another size" : "this is the first step"); return; }
    const heat = distance(now, then);
    this.change.show(heatOf(heat, greatest(heat.data)), `since ${before.number === step.number - 1 ? "the step before" : `step ${before.number}`}, rms ${number(rms(heat.data))}`);
  }
}

const sizeOf = ({ shape: [, height, width] }) => `${width} × ${height}`;

// The map (h, w) of a word.
export function wordMap(maps, word) {
  const [, rows, columns] = maps.shape;
  return { shape: [rows, columns], data: maps.data.subarray(word * rows * columns, (word + 1) * rows * columns) };
}

// Two runs under one slider: how far their canvases, estimates and pictures are from each other.
export class Difference {
  constructor(player, [a, b]) {
    this.runs = [a, b];
    this.frames = { state: new Frame("Difference of the canvases"), denoised: new Frame("Difference of the estimates") };
    this.final = new Frame("Difference of the pictures");
    this.element = h("div", { class: "run-panels" }, h("h3", { class: "run" }, "A − B"), h("div", { class: "panels" }, ...[...Object.values(this.frames), this.final].map((frame) => frame.element)));
    player.listeners.push((i) => this.draw(i));
    this.pictures();
  }

  draw(i) {
    const [a, b] = this.runs, k = bothFull(a, b, i), ended = this.runs.find((run) => i >= run.steps.length);
    const steps = this.runs.map((run) => (k < 0 ? run.full(i) : run.used(run.steps[k])));
    for (const [name, frame] of Object.entries(this.frames)) {
      const [x, y] = steps.map((step) => step?.tensor(name));
      if (!same(x, y)) { frame.show(null, x && y ? `of ${sizeOf(x)} and ${sizeOf(y)} latents` : "nothing was recorded"); continue; }
      if (k < 0) { frame.show(null, ended ? `run ${"AB"[ended.number]} has ended` : "no step is shown in full in both"); continue; }
      const heat = distance(x, y), size = rms(heat.data), where = k === i ? "" : `of step ${k + 1}: `;
      frame.show(heatOf(heat, greatest(heat.data)), where + (size ? `rms ${number(size)}, ${number((100 * size) / rms(x.data), 2)}%` : "none"));
    }
  }

  async pictures() {
    const addresses = this.runs.map((run) => run.end?.picture);
    if (addresses.some((address) => !address)) { this.final.show(null, "a run has none"); return; }
    const [x, y] = await Promise.all(addresses.map(pixels));
    if (x.width !== y.width || x.height !== y.height) { this.final.show(null, "of different sizes"); return; }
    const data = new Float32Array(x.width * x.height);
    for (let p = 0; p < data.length; p++) data[p] = Math.hypot(...[0, 1, 2].map((k) => x.data[4 * p + k] - y.data[4 * p + k])) / 255;
    this.final.show(heatOf({ shape: [x.height, x.width], data }, 1), `rms ${number(rms(data) / Math.sqrt(3))}`);
  }
}

async function pixels(address) {
  const image = new Image();
  image.src = address;
  await image.decode();
  const canvas = new OffscreenCanvas(image.width, image.height), context = canvas.getContext("2d");
  context.drawImage(image, 0, 0);
  return context.getImageData(0, 0, image.width, image.height);
}
