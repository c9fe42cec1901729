// The patches of a step before and after the exchange, linked: a pixel, where its values come from and go to.
import { item, patch } from "./tensors.js";
import { pictureOf, without } from "./colours.js";
import { h, svg, Frame, paintGrid, choice } from "./paint.js";
import { bars } from "./views.js";

// Patch n stands at row y and column x of the exchange: the patches that its channels have their values from.
export function sourcesOf(permutation, n, y, x, channels) {
  if (!permutation) return Array(channels).fill(n);
  const [, depth, height, width] = permutation.shape;
  return Array.from({ length: channels }, (_, c) => permutation.data[((n * depth + (depth > 1 ? c : 0)) * height + y) * width + x]);
}

// The patches that the channels of patch n at that place went to.
export function targetsOf(permutation, n, y, x, channels) {
  if (!permutation) return Array(channels).fill(n);
  const targets = Array(channels).fill(n);
  for (let m = 0; m < permutation.shape[0]; m++) sourcesOf(permutation, m, y, x, channels).forEach((source, c) => { if (source === n) targets[c] = m; });
  return targets;
}

export class Patches {
  constructor(player, run) {
    this.player = player;
    this.run = run;
    this.show = "denoised";
    this.chosen = null; // the exchanged patch whose bar is pressed
    this.sides = { before: this.side("before", "In place"), after: this.side("after", "Exchanged") };
    this.whole = new Frame("Whole", { overlay: true });
    this.readout = h("p", { class: "link", role: "status" });
    this.bars = h("div", { class: "bars" });
    this.about = h("p", { class: "note" });
    this.distances = h("h3", {});
    this.agreement = h("p", { class: "note" });
    const which = choice("Patches of", [["denoised", "what was predicted"], ["state", "what was read"]], this.show, (value) => { this.show = value; this.draw(player.step); });
    this.element = h("section", { id: `patches-${run.number}`, class: "card" }, h("header", {}, h("h2", {}, "Patches"), which), this.about,
      h("div", { class: "triple" }, this.whole.element, this.sides.before.element, this.sides.after.element), this.readout,
      this.distances, this.agreement, this.bars);
    player.listeners.push((step) => this.draw(step));
  }

  side(name, title) {
    const canvas = h("canvas", { tabindex: 0, role: "application", width: 1, height: 1, class: "grid" });
    const over = svg("svg", { class: "over", "aria-hidden": "true" });
    const note = h("span", { class: "note" }), heading = h("span", {}, title);
    const point = (event) => {
      const box = canvas.getBoundingClientRect();
      this.point(name, Math.floor(((event.clientX - box.left) / box.width) * canvas.width), Math.floor(((event.clientY - box.top) / box.height) * canvas.height));
    };
    canvas.addEventListener("pointermove", point);
    canvas.addEventListener("pointerdown", point);
    canvas.addEventListener("pointerleave", () => { if (document.activeElement !== canvas) this.clear(); });
    canvas.addEventListener("keydown", (event) => this.key(name, event));
    canvas.addEventListener("focus", () => { if (this.items && !this.place) this.link(name, 0, 0, 0); });
    return { canvas, over, note, title: heading, element: h("figure", { class: "frame" }, h("figcaption", {}, heading, note), h("div", { class: "picture" }, canvas, over)) };
  }

  draw(i) {
    const step = this.run.full(i), n = step ? step.items.findIndex((items) => items.kind === "patches") : -1;
    this.element.hidden = n < 0;
    if (n < 0) { this.items = null; this.clear(); return; }
    const items = step.items[n], [height, width] = items.size, { run } = this;
    if (this.chosen >= items.number) this.chosen = null;
    Object.assign(this, { items, permutation: step.of(n, "permutation"), channels: (step.tensor("state") || step.tensor("denoised")).shape[0] });
    this.gap = Math.max(1, Math.round((width * items.grid[1]) / 90));
    const scale = this.show === "state" ? step.scale : 1, whole = step.tensor(this.show), estimates = this.show === "denoised" ? step.of(n, "estimates") : null;
    const cut = whole && Array.from({ length: items.number }, (_, k) => patch(whole, k, items.grid, height, width));
    const exchanged = estimates ? cut.map((_, k) => item(estimates, k)) : cut?.map((_, k) => this.exchanged(cut, k));
    const grid = (side, patches) => {
      paintGrid(side.canvas, patches.map((each) => (each.outside ? without(pictureOf(each, run.map, scale), each.outside) : pictureOf(each, run.map, scale))), items.grid[1], this.gap);
      side.over.setAttribute("viewBox", `0 0 ${side.canvas.width} ${side.canvas.height}`);
    };
    this.whole.show(whole && pictureOf(whole, run.map, scale), this.show === "state" ? "the canvas" : "the estimate");
    if (cut) { grid(this.sides.before, cut); grid(this.sides.after, exchanged); }
    const exchange = !this.permutation ? "" : this.permutation.shape[1] > 1 ? "each channel of a pixel by itself" : "whole pixels";
    const predicted = this.show === "denoised";
    this.about.textContent = `${items.grid[0]} × ${items.grid[1]} interleaved patches of ${height} × ${width} latents, which exchange ${exchange || "nothing"}.`;
    this.sides.before.note.textContent = predicted ? `${exchange && "exchanged back: "}the estimate, cut` : "the canvas, cut";
    this.sides.after.note.textContent = predicted ? "what the network drew" : "what the network read";
    for (const side of Object.values(this.sides)) side.canvas.setAttribute("aria-label", `${items.number} patches, ${side.note.textContent}. Arrow keys move over the pixels.`);
    this.sides.after.title.textContent = exchange ? "Exchanged" : "One by one";
    this.distances.textContent = `Distance of each ${exchange && "exchanged "}patch to the mean of all`;
    this.agreement.textContent = `Each patch is one in ${items.number} of the ${exchange ? "estimate's values: what only a few of them show is averaged away in the steps to come, the sooner the more patches there are" : "canvas's values"}. Press a bar to frame its patch; the arrow keys up and down go over the bars.`;
    this.element.classList.toggle("fine", items.grid[1] > 2);
    this.bars.replaceChildren(bars(items, (k) => `patch ${k + 1}`, this.chosen, (k) => this.choose(k)));
    this.clear();
  }

  choose(k) {
    this.chosen = this.chosen === k ? null : k;
    [...this.bars.querySelectorAll("button")].forEach((button, n) => { button.setAttribute("aria-pressed", String(n === this.chosen)); button.tabIndex = n === k ? 0 : -1; });
    this.clear();
  }

  // The place of patch n on a side, and the frame around the chosen one.
  corner(n) { return [(n % this.items.grid[1]) * (this.items.size[1] + this.gap), Math.floor(n / this.items.grid[1]) * (this.items.size[0] + this.gap)]; }
  frame(name) {
    if (name !== "after" || this.chosen === null || !this.items) return [];
    const [x, y] = this.corner(this.chosen), [height, width] = this.items.size;
    return [svg("rect", { x, y, width, height, class: "patch-frame" })];
  }

  exchanged(cut, n) {
    const { shape } = cut[n], [channels, height, width] = shape, data = new Float32Array(cut[n].data.length), outside = new Uint8Array(height * width);
    for (let y = 0; y < height; y++) for (let x = 0; x < width; x++) sourcesOf(this.permutation, n, y, x, channels).forEach((source, c) => {
      data[(c * height + y) * width + x] = cut[source].data[(c * height + y) * width + x];
      if (cut[source].outside[y * width + x]) outside[y * width + x] = 1;
    });
    return { shape, data, outside };
  }

  point(name, column, row) {
    const [height, width] = this.items.size, j = Math.floor(column / (width + this.gap)), i = Math.floor(row / (height + this.gap));
    const x = column - j * (width + this.gap), y = row - i * (height + this.gap);
    if (x < 0 || y < 0 || x >= width || y >= height || j >= this.items.grid[1] || i >= this.items.grid[0]) this.clear();
    else this.link(name, i * this.items.grid[1] + j, y, x);
  }

  key(name, event) {
    const by = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!by) return;
    event.preventDefault();
    const { n, y, x } = this.place || { n: 0, y: 0, x: 0 }, [rows, columns] = this.items.grid, [height, width] = this.items.size;
    const Y = Math.min(Math.max(Math.floor(n / columns) * height + y + by[0], 0), rows * height - 1);
    const X = Math.min(Math.max((n % columns) * width + x + by[1], 0), columns * width - 1);
    this.link(name, Math.floor(Y / height) * columns + Math.floor(X / width), Y % height, X % width);
  }

  clear() {
    this.place = null;
    this.whole.over.replaceChildren();
    for (const [name, side] of Object.entries(this.sides)) side.over.replaceChildren(...this.frame(name));
    this.bars.querySelector(".here")?.classList.remove("here");
    this.readout.textContent = "Point at a pixel of a patch, or walk with the arrow keys, to see where its values come from and go to.";
    for (const name of Object.keys(this.readout.dataset)) delete this.readout.dataset[name];
  }

  // A part of a square for each channel, in the square of the patch that it is in.
  channelMarks(patches, corner, size) {
    const across = Math.ceil(Math.sqrt(patches.length)), part = size / across;
    return patches.map((m, c) => svg("rect", { x: corner(m)[0] + (c % across) * part, y: corner(m)[1] + Math.floor(c / across) * part, width: part, height: part, class: "channel", style: `fill:var(--c${c % 4})` }));
  }

  // Mark pixel (y, x) of patch n of one side, and where its channels are on the other.
  link(name, n, y, x) {
    this.place = { n, y, x };
    const other = name === "before" ? "after" : "before", [rows, columns] = this.items.grid, [height, width] = this.items.size;
    const others = (name === "before" ? targetsOf : sourcesOf)(this.permutation, n, y, x, this.channels);
    const corner = (m) => [this.corner(m)[0] + x, this.corner(m)[1] + y];
    const least = Math.max(1, this.sides.before.canvas.width / 32); // so that a mark is seen on a large canvas, too
    for (const [key, side] of Object.entries(this.sides)) {
      side.over.replaceChildren(...this.frame(key), ...Array.from({ length: this.items.number }, (_, m) => {
        const [left, top] = corner(m).map((start) => start + 0.5 - least / 2);
        return svg("rect", { x: left, y: top, width: least, height: least, class: key === name && m === n ? "mark chosen" : "mark" });
      }));
    }
    [...this.bars.querySelectorAll("button")].forEach((button, m) => button.classList.toggle("here", name === "after" && m === n));
    this.sides[other].over.append(...this.channelMarks(others, (m) => corner(m).map((start) => start + 0.5 - least / 2), least));
    const size = Math.max(1, this.whole.canvas.width / 32), placed = (m) => [x * columns + (m % columns) + 0.5 - size / 2, y * rows + Math.floor(m / columns) + 0.5 - size / 2];
    const box = (m, kind) => svg("rect", { x: placed(m)[0], y: placed(m)[1], width: size, height: size, class: kind });
    this.whole.over.replaceChildren(...(name === "before" ? [box(n, "mark chosen")] : [...new Set(others)].map((m) => box(m, "mark"))));
    if (name === "after") this.whole.over.append(...this.channelMarks(others, placed, size));
    const Y = y * rows + Math.floor(n / columns), X = x * columns + (n % columns);
    const list = others.map((m, c) => h("span", { class: "key" }, h("i", { class: "dot", style: `--c:var(--c${c % 4})` }), `channel ${c + 1} ${name === "before" ? "to" : "from"} patch ${m + 1}`));
    this.readout.replaceChildren(`Patch ${n + 1}, row ${y + 1}, column ${x + 1}${name === "before" || !this.permutation ? `, canvas row ${Y + 1}, column ${X + 1}` : " after the exchange"}: `, ...list.flatMap((each, c) => [c ? ", " : "", each]));
    Object.assign(this.readout.dataset, { side: name, patch: n, row: y, column: x, others: others.join(",") });
  }
}
