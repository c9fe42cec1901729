// The runs of a page, read from its blocks.
import { tensor, same, distance, rms } from "./tensors.js";
import { number } from "./paint.js";

const KEPT = 24; // the steps whose tensors are kept decoded

export class Step {
  constructor(block) { Object.assign(this, block); this.parts = block; this.cache = new Map(); }
  // The factor that brings its canvas to the deviation of an estimate: of x0 + σ·noise, or of a flow's own.
  get scale() { return this.time === null ? 1 / Math.hypot(1, this.sigma) : 1 / Math.hypot(1 - this.time, this.time); }
  // The deviation of the canvas as it is shown, which in a flow is its own.
  get energy() { return this.curves?.state_std == null || this.time === null ? this.curves?.state_std ?? null : this.curves.state_std / (1 + this.sigma); }
  get level() { return this.time === null ? `σ ${number(this.sigma)}` : `t ${number(this.time)}`; }
  badIn(name) { const part = this.tensor(name); return part ? part.data.reduce((sum, value) => sum + !Number.isFinite(value), 0) : 0; }
  get isFull() { return Boolean(this.parts.denoised || this.parts.state); }
  tensor(name) {
    if (!this.cache.has(name)) this.cache.set(name, tensor(this.parts[name]));
    return this.cache.get(name);
  }
  of(n, name) {
    const key = `${n} ${name}`;
    if (!this.cache.has(key)) this.cache.set(key, tensor(this.parts.items[n][name]));
    return this.cache.get(key);
  }
  get isBad() { return Boolean(this.curves.not_finite) || (this.items || []).some((items) => items.not_finite.some(Boolean)); }
}

export class Run {
  constructor(number, info) { this.number = number; this.info = info; this.steps = []; this.end = null; this.recent = []; }
  // A step's number is its place in the run: a method may leave steps of the schedule out, or take them again.
  add(step) { this.steps.push(step); step.number = this.steps.length; }
  get map() { return (this.end && this.end.map) || this.info.map; }
  get stages() { return [...new Set(this.steps.map((step) => step.stage))]; }
  at(i) { return this.steps[Math.min(i, this.steps.length - 1)]; }
  // The last step up to i that was recorded in full, and the one before it.
  full(i) { return this.fullBefore(Math.min(i, this.steps.length - 1) + 1); }
  fullBefore(i) {
    for (let k = i - 1; k >= 0; k--) if (this.steps[k].isFull) return this.used(this.steps[k]);
    return null;
  }
  used(step) {
    this.recent = [...this.recent.filter((other) => other !== step), step];
    if (this.recent.length > KEPT) this.recent.shift().cache.clear();
    return step;
  }
  get firstBad() { return this.steps.findIndex((step) => step.isBad); }
}

export function readRuns() {
  const runs = [];
  for (const element of document.querySelectorAll("script.block")) {
    const number = Number(element.dataset.run);
    let block = null;
    try { block = JSON.parse(element.textContent); } catch { continue; } // the file was cut off inside of it
    element.textContent = "";
    if (block.kind === "run") runs[number] = new Run(number, block);
    else if (block.kind === "step") runs[number].add(new Step(block));
    else if (block.kind === "end") runs[number].end = block;
  }
  return runs.filter((run) => run);
}

// The first steps at which two runs part: by a bit in the canvas, in the estimate, and by more than `share` of `parts`,
// which are as `apart` has them. Every step has a digest of what it ended with, which the next one begins with.
export function parting(a, b, parts, share = 0.01) {
  const length = Math.min(a.steps.length, b.steps.length), first = { state: null, denoised: null, share: null };
  for (let i = 0; i < length; i++) {
    const differ = (k, name) => { const [x, y] = [a, b].map((run) => run.steps[k]?.digest[name]); return x && y ? x !== y : null; };
    if (first.state === null && (differ(i, "state") ?? differ(i - 1, "latents"))) first.state = i;
    if (first.denoised === null && differ(i, "denoised")) first.denoised = i;
    if (first.share === null && parts.denoised[i] > share) first.share = i;
  }
  return first;
}

// Why two runs that are so far `between` each other, as `apart` says, have no difference; null where they have.
export function incomparable(a, b, between) {
  const [x, y] = [a, b].map(({ info }) => info.size.map((side) => side * info.factor).reverse().join(" × "));
  if (x === y || [...between.state, ...between.denoised].some((value) => value !== null)) return null;
  return `Run A has a canvas of ${x} px, and run B one of ${y} px: no pixel of the one has a counterpart in the other, so there is no difference to show, and no step at which they part. The curves below compare them.`;
}

// The last step up to i that both runs have in full, as its place; −1 where there is none, or one run has ended before.
export function bothFull(a, b, i) {
  if (i >= Math.min(a.steps.length, b.steps.length)) return -1;
  while (i >= 0 && !(a.steps[i].isFull && b.steps[i].isFull)) i--;
  return i;
}

// The first place at which two runs that are compared step by step are at other noise; null where they never are.
export function unlike(a, b) {
  const i = a.steps.findIndex((step, n) => n < b.steps.length && Math.abs(step.sigma - b.steps[n].sigma) > 1e-6 * Math.max(step.sigma, b.steps[n].sigma));
  return i < 0 ? null : i;
}

// The distance of the canvases and of the estimates of two runs at each step, relative to the first run's.
export function apart(a, b) {
  const both = { state: [], denoised: [] };
  for (let i = 0; i < Math.min(a.steps.length, b.steps.length); i++) for (const name of ["state", "denoised"]) {
    const [x, y] = [a.steps[i], b.steps[i]].map((step) => tensor(step.parts[name]));
    both[name].push(same(x, y) ? rms(distance(x, y).data) / rms(x.data) : null);
  }
  return both;
}
