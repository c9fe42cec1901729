// The views of a step: their frames over the canvas, and what a chosen one predicted alone. Other items, too.
import { item, crop, distance, rms, greatest } from "./tensors.js";
import { pictureOf, heatOf, without } from "./colours.js";
import { h, svg, Frame, choice, number, paintGrid } from "./paint.js";

// A bar for each item, as long as its distance, over its number; with `onchoose` they are buttons, of
// which the tab key stops at one, and the arrow keys up and down go on.
export function bars(items, name, chosen = null, onchoose = null) {
  const most = Math.max(...items.distances.filter(Number.isFinite), 1e-9), few = items.number <= 20, many = items.number > 64;
  return h("ol", { class: `bar-list ${few ? "few" : many ? "many" : ""}` }, ...items.distances.map((value, n) => {
    const bad = items.not_finite[n], text = bad ? `${bad} not finite` : number(value, 2);
    const inside = [h("span", { class: "fill", style: `height:${bad ? 100 : Math.max(2, (100 * value) / most)}%` })];
    const label = `${name(n)}, distance ${text}`;
    const go = (event) => {
      const by = { ArrowUp: -1, ArrowDown: 1 }[event.key], others = [...event.currentTarget.closest("ol").querySelectorAll("button")];
      if (!by) return;
      event.preventDefault();
      event.currentTarget.tabIndex = -1;
      const next = others[Math.min(Math.max(n + by, 0), others.length - 1)];
      next.tabIndex = 0;
      next.focus();
    };
    const attributes = { class: bad ? "column bad-item" : "column", title: label, "aria-label": label };
    const element = onchoose ? h("button", { type: "button", ...attributes, "aria-pressed": String(n === chosen), tabindex: n === (chosen ?? 0) ? 0 : -1, onkeydown: go, onclick: () => onchoose(n) }, ...inside) : h("span", { ...attributes, role: "img" }, ...inside);
    return h("li", {}, element, many ? null : h("small", { "aria-hidden": "true" }, h("b", {}, n + 1), few ? ` ${text}` : null));
  }));
}

export class Views {
  constructor(player, run) {
    this.player = player;
    this.run = run;
    this.chosen = 0;
    this.show = "denoised";
    this.whole = new Frame("All views, averaged", { overlay: true });
    this.alone = new Frame("Alone");
    this.others = new Frame("All, here");
    this.apart = new Frame("How far apart");
    this.bars = h("div", { class: "bars" });
    this.about = h("p", { class: "note" });
    const which = choice("Behind the frames", [["denoised", "estimate"], ["state", "canvas"]], this.show, (value) => { this.show = value; this.draw(player.step); });
    this.element = h("section", { id: `views-${run.number}`, class: "card" }, h("header", {}, h("h2", {}, "Views"), which), this.about,
      h("div", { class: "pair views" }, this.whole.element, h("div", {}, h("div", { class: "three" }, this.alone.element, this.others.element, this.apart.element),
        h("h3", {}, "Distance of each view to the average in its place"), this.bars)));
    this.whole.over.addEventListener("click", (event) => this.click(event));
    player.listeners.push((step) => this.draw(step));
  }

  draw(i) {
    const step = this.run.full(i), n = step ? step.items.findIndex((items) => items.kind === "views") : -1;
    this.element.hidden = n < 0;
    this.step = null;
    if (n < 0) return;
    const items = step.items[n], { run } = this, whole = step.tensor(this.show), [height, width] = items.size;
    if (!whole) { this.element.hidden = true; return; }
    this.chosen = Math.min(this.chosen, items.number - 1);
    Object.assign(this, { step, items });
    this.whole.show(pictureOf(whole, run.map, this.show === "state" ? step.scale : 1), `${items.number} views`);
    const before = run.fullBefore(run.steps.indexOf(step))?.items.find((each) => each.kind === "views" && each.number === items.number && each.size.join() === items.size.join());
    const frame = ([top, left], kind, k) => svg("rect", { x: left, y: top, width, height, class: kind, "data-view": k ?? null, "vector-effect": "non-scaling-stroke" });
    const [, H, W] = whole.shape, around = ([top, left]) => (items.wraps ? [[0, 0], [-H, 0], [0, -W], [-H, -W]] : [[0, 0]]).map(([a, b]) => [top + a, left + b]);
    const many = items.number > 16, then = before ? (many ? [before.origins[this.chosen]] : before.origins) : [];
    this.whole.over.classList.toggle("many", many);
    this.whole.over.replaceChildren(...then.flatMap((origin) => around(origin).map((each) => frame(each, "view then"))),
      ...items.origins.flatMap((origin, k) => around(origin).map((each) => frame(each, "view", k))),
      ...around(items.origins[this.chosen]).map((each) => frame(each, "view chosen", this.chosen)));
    const estimate = step.tensor("denoised"), alone = item(step.of(n, "estimates"), this.chosen), here = crop(estimate, ...items.origins[this.chosen], height, width, items.wraps);
    const heat = distance(alone, here), inside = heat.data.filter((_, p) => !here.outside[p]), [top, left] = items.origins[this.chosen];
    this.alone.show(pictureOf(alone, run.map), `view ${this.chosen + 1}`);
    this.others.show(without(pictureOf(here, run.map), here.outside), `row ${top}, column ${left}`);
    this.apart.show(without(heatOf(heat, greatest(inside)), here.outside), `rms ${number(rms(inside))}`);
    this.about.textContent = `${items.number} overlapping views of ${height} × ${width} latents. ${many ? "Dotted is the chosen one's frame" : "Dotted are the frames"} of the step before. Click one; the arrow keys up and down go over the bars.`;
    this.bars.replaceChildren(bars(items, (k) => `view ${k + 1}`, this.chosen, (k) => this.choose(k)));
  }

  choose(k) {
    const inBars = this.bars.contains(document.activeElement);
    this.chosen = k;
    this.draw(this.player.step);
    if (inBars) this.bars.querySelectorAll("button")[k].focus();
  }

  // The view whose middle is nearest, of those that hold the point.
  click(event) {
    const box = this.whole.over.getBoundingClientRect(), [, H, W] = this.step.tensor(this.show).shape, [height, width] = this.items.size;
    const y = ((event.clientY - box.top) / box.height) * H, x = ((event.clientX - box.left) / box.width) * W;
    const away = this.items.origins.map(([top, left]) => Math.hypot(...[[y, top, height, H], [x, left, width, W]].map(([p, start, length, side]) => {
      const off = p - (start + length / 2);
      return this.items.wraps ? Math.min(Math.abs(off), Math.abs(off + side), Math.abs(off - side)) : off;
    })));
    this.choose(away.indexOf(Math.min(...away)));
  }
}

// Items of an operator that says neither grid nor origins, and pictures beside the canvas.
export class Others {
  constructor(player, run) {
    this.player = player;
    this.run = run;
    this.canvas = h("canvas", { role: "img", width: 1, height: 1, class: "grid" });
    this.bars = h("div", { class: "bars" });
    this.about = h("p", { class: "note" });
    this.title = h("h3", {}, "Distance of each item to all together");
    this.element = h("section", { id: `items-${run.number}`, class: "card" }, h("header", {}, h("h2", {}, "Items")), this.about, h("div", { class: "picture" }, this.canvas),
      this.title, this.bars);
    player.listeners.push((step) => this.draw(step));
  }

  draw(i) {
    const step = this.run.full(i), n = step ? step.items.findIndex((items) => items.kind === "items") : -1;
    this.element.hidden = n < 0;
    if (n < 0) return;
    const items = step.items[n], estimates = step.of(n, "estimates"), pictures = items.distances.map((_, k) => pictureOf(item(estimates, k), this.run.map));
    const columns = Math.ceil(Math.sqrt(items.number));
    paintGrid(this.canvas, pictures, columns, Math.max(1, Math.round((columns * items.size[1]) / 90)));
    this.title.hidden = items.number < 2;
    this.about.textContent = `${items.number} of ${items.size.join(" × ")} latents: what the network predicted for each.`;
    this.canvas.setAttribute("aria-label", this.about.textContent);
    this.bars.replaceChildren(items.number > 1 ? bars(items, (k) => `item ${k + 1}`) : "");
  }
}
