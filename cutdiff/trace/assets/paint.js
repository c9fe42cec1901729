// Elements, and pictures in them.

function made(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

export const h = (name, attributes = {}, ...children) => made(document.createElement(name), attributes, children);
export const svg = (name, attributes = {}, ...children) => made(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);

// Foreign text, which keeps its own direction to itself.
export const foreign = (text, attributes = {}) => h("bdi", { dir: "auto", ...attributes }, text);

export function paint(canvas, picture) {
  canvas.width = picture.width;
  canvas.height = picture.height;
  canvas.getContext("2d").putImageData(new ImageData(picture.rgba, picture.width, picture.height), 0, 0);
}

// Several pictures of one size on one canvas, in rows, with a gap of `gap` pixels.
export function paintGrid(canvas, pictures, columns, gap) {
  const { width, height } = pictures[0], rows = Math.ceil(pictures.length / columns);
  canvas.width = columns * width + (columns - 1) * gap;
  canvas.height = rows * height + (rows - 1) * gap;
  const context = canvas.getContext("2d");
  pictures.forEach((picture, n) => context.putImageData(new ImageData(picture.rgba, width, height),
    (n % columns) * (width + gap), Math.floor(n / columns) * (height + gap)));
}

// A picture with a title and a note above, and below the scale of one of magnitudes.
export class Frame {
  constructor(title, { overlay = false } = {}) {
    this.canvas = h("canvas", { role: "img", width: 1, height: 1 });
    this.image = h("img", { alt: "", hidden: true });
    this.title = h("span", {}, title);
    this.note = h("span", { class: "note" });
    this.over = overlay ? svg("svg", { class: "over", "aria-hidden": "true" }) : null;
    this.box = h("div", { class: "picture" }, this.canvas, this.image, this.over);
    this.most = h("span", {});
    this.scale = h("p", { class: "scale note", hidden: true }, "0 ", h("i", { "aria-hidden": "true" }), " ", this.most);
    this.element = h("figure", { class: "frame" }, h("figcaption", {}, this.title, this.note), this.box, this.scale);
  }

  // `picture` are pixels, the address of an image, or nothing.
  show(picture, note = "", label = "") {
    const isImage = typeof picture === "string";
    this.box.classList.toggle("empty", !picture);
    this.scale.hidden = !picture?.most;
    this.most.textContent = number(picture?.most, 2);
    this.image.hidden = !isImage;
    this.canvas.hidden = isImage || !picture;
    if (isImage) { this.image.src = picture; this.image.alt = label || this.title.textContent; }
    else if (picture) {
      paint(this.canvas, picture);
      if (this.over) this.over.setAttribute("viewBox", `0 0 ${picture.width} ${picture.height}`);
    }
    this.note.textContent = note;
    this.canvas.setAttribute("aria-label", label || [this.title.textContent, note].join(", "));
  }
}

// Buttons of which one is pressed.
export function choice(label, options, chosen, onchoose) {
  const buttons = options.map(([value, text]) => h("button", { type: "button", "aria-pressed": String(value === chosen), onclick: () => {
    buttons.forEach((button) => button.setAttribute("aria-pressed", String(button === buttons[options.findIndex(([v]) => v === value)])));
    onchoose(value);
  } }, text));
  return h("div", { class: "choice", role: "group", "aria-label": label }, ...buttons);
}

// A number of things: "1 step", "2 steps".
export const count = (n, thing) => `${n} ${thing}${n === 1 ? "" : "s"}`;

export function number(value, digits = 3) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  if (value !== 0 && (Math.abs(value) < 0.001 || Math.abs(value) >= 1e5)) return value.toExponential(1);
  return String(Number(value.toPrecision(digits)));
}
