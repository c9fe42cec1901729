// Colours of latents, of magnitudes and of what is not finite.

// Cividis (Nuñez, Anderton, Renslow 2018), which reads alike with and without colour blindness, at nine places.
const MAGNITUDES = [[0, 32, 76], [0, 49, 110], [53, 69, 108], [87, 93, 109], [112, 113, 115], [143, 136, 119], [177, 160, 112], [214, 187, 90], [255, 234, 70]];
export const BAD = [[255, 0, 144], [20, 0, 12]];

export function magnitude(share) {
  const place = Math.min(Math.max(share, 0), 1) * (MAGNITUDES.length - 1), i = Math.min(Math.floor(place), MAGNITUDES.length - 2);
  return [0, 1, 2].map((k) => MAGNITUDES[i][k] + (place - i) * (MAGNITUDES[i + 1][k] - MAGNITUDES[i][k]));
}

function put(rgba, p, colour) {
  rgba[4 * p] = colour[0]; rgba[4 * p + 1] = colour[1]; rgba[4 * p + 2] = colour[2]; rgba[4 * p + 3] = 255;
}

// Latents (C, H, W) times `scale` -> {width, height, rgba} by the map (3, C + 1); chequered where not finite.
export function pictureOf(latents, map, scale = 1) {
  const [channels, height, width] = latents.shape, size = height * width, rgba = new Uint8ClampedArray(4 * size).fill(255);
  const sums = new Float32Array(size), bad = new Uint8Array(size);
  for (let k = 0; k < 3; k++) {
    sums.fill(255 * map[k][channels]);
    for (let c = 0; c < channels; c++) {
      const factor = 255 * scale * map[k][c], start = c * size;
      for (let p = 0; p < size; p++) sums[p] += factor * latents.data[start + p];
    }
    for (let p = 0; p < size; p++) { rgba[4 * p + k] = sums[p]; if (!Number.isFinite(sums[p])) bad[p] = 1; }
  }
  for (let p = 0; p < size; p++) if (bad[p]) put(rgba, p, BAD[(p + Math.floor(p / width)) % 2]);
  return { width, height, rgba };
}

// The picture without the pixels that `outside` marks.
export function without(picture, outside) {
  outside.forEach((is, p) => { if (is) picture.rgba[4 * p + 3] = 0; });
  return picture;
}

// Values (H, W), 0 to `most` -> {width, height, rgba, most}.
export function heatOf({ shape: [height, width], data }, most) {
  const rgba = new Uint8ClampedArray(4 * width * height);
  data.forEach((value, p) => put(rgba, p, Number.isFinite(value) ? magnitude(value / most) : BAD[(p + Math.floor(p / width)) % 2]));
  return { width, height, rgba, most };
}

// A picture seen through a map (h, w): bright where the map is greatest, dark where it is least.
export function through(picture, { shape: [rows, columns], data }) {
  const { width, height } = picture, rgba = new Uint8ClampedArray(picture.rgba), least = Math.min(...data), range = Math.max(...data) - least || 1;
  for (let y = 0; y < height; y++) for (let x = 0; x < width; x++) {
    const p = 4 * (y * width + x), value = between(data, rows, columns, ((y + 0.5) * rows) / height - 0.5, ((x + 0.5) * columns) / width - 0.5);
    const light = 0.08 + (1.02 * (value - least)) / range;
    for (let k = 0; k < 3; k++) rgba[p + k] *= light;
  }
  return { width, height, rgba };
}

function between(data, rows, columns, y, x) {
  const Y = Math.min(Math.max(y, 0), rows - 1), X = Math.min(Math.max(x, 0), columns - 1);
  const i = Math.min(Math.floor(Y), Math.max(rows - 2, 0)), j = Math.min(Math.floor(X), Math.max(columns - 2, 0));
  const k = Math.min(i + 1, rows - 1), l = Math.min(j + 1, columns - 1), a = Y - i, b = X - j;
  return (1 - a) * ((1 - b) * data[i * columns + j] + b * data[i * columns + l]) + a * ((1 - b) * data[k * columns + j] + b * data[k * columns + l]);
}
