// The attention over each word of the prompt: small pictures of all words, of which one may be laid over the estimate.
import { pictureOf, through } from "./colours.js";
import { h, foreign, paint, number } from "./paint.js";
import { wordMap } from "./panels.js";

export class Words {
  constructor(player, run, panels) {
    this.player = player;
    this.run = run;
    this.panels = panels;
    const words = run.info.words;
    this.canvases = words.map(() => h("canvas", { width: 1, height: 1, "aria-hidden": "true" }));
    this.shares = words.map(() => h("small", { class: "note" }));
    this.buttons = words.map((word, n) => h("button", { type: "button", class: "word", "aria-pressed": "false", onclick: () => this.choose(n) }, this.canvases[n], h("span", {}, foreign(word), " ", this.shares[n])));
    this.element = h("section", { id: `words-${run.number}`, class: "card" }, h("header", {}, h("h2", {}, "Words")),
      h("p", { class: "note" }, words.length ? "Where the network attends to each word at this step, and how much of its attention the word gets: the mean over heads and layers. Click one to see it on the estimate above." : `No attention was recorded: ${run.info.words_unread || "the prompt is empty"}.`),
      h("div", { class: "words" }, ...this.buttons));
    player.listeners.push((step) => this.draw(step));
  }

  choose(n) {
    this.panels.word = this.panels.word === n ? null : n;
    this.buttons.forEach((button, k) => button.setAttribute("aria-pressed", String(k === this.panels.word)));
    this.panels.draw(this.player.step);
  }

  draw(i) {
    const step = this.run.full(i), maps = step?.tensor("attention"), estimate = step?.tensor("denoised");
    this.element.hidden = this.canvases.length > 0 && !(maps && estimate);
    if (!maps || !estimate) return;
    const picture = pictureOf(estimate, this.run.map);
    this.canvases.forEach((canvas, n) => {
      const map = wordMap(maps, n);
      paint(canvas, through(picture, map));
      this.shares[n].textContent = `${number((100 * map.data.reduce((a, b) => a + b, 0)) / map.data.length, 2)}%`;
    });
  }
}
