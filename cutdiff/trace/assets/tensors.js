// Tensors as the page holds them: base64 of float16, of bytes between two values, or of whole numbers.

const HALVES = new Float32Array(65536);
for (let bits = 0; bits < 65536; bits++) {
  const sign = bits & 0x8000 ? -1 : 1, exponent = (bits >> 10) & 31, mantissa = bits & 1023;
  HALVES[bits] = sign * (exponent === 31 ? (mantissa ? NaN : Infinity)
    : exponent ? 2 ** (exponent - 15) * (1 + mantissa / 1024) : 2 ** -14 * (mantissa / 1024));
}

function bytesOf(text) {
  const raw = atob(text), bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  return bytes;
}

// {as, shape, data, …} -> {shape, data}, or null of null. The values are numbers, NaN where they were not finite.
export function tensor(part) {
  if (!part) return null;
  const bytes = bytesOf(part.data);
  if (part.as === "uint8") return { shape: part.shape, data: bytes };
  if (part.as === "uint16") return { shape: part.shape, data: new Uint16Array(bytes.buffer) };
  if (part.as === "float16") return { shape: part.shape, data: Float32Array.from(new Uint16Array(bytes.buffer), (b) => HALVES[b]) };
  const step = (part.high - part.low) / 254;
  return { shape: part.shape, data: Float32Array.from(bytes, (b) => (b === 255 ? NaN : part.low + b * step)) };
}

// Item n of (N, C, h, w), as (C, h, w).
export function item(stack, n) {
  const [, ...shape] = stack.shape, size = shape.reduce((a, b) => a * b, 1);
  return { shape, data: stack.data.subarray(n * size, (n + 1) * size) };
}

// The part of (C, H, W) of so many rows and columns that begins at (top, left), around the border if it `wraps`;
// `outside` marks what no canvas is under, and is 0.
export function crop(canvas, top, left, rows, columns, wraps = false) {
  const [channels, height, width] = canvas.shape, data = new Float32Array(channels * rows * columns), outside = new Uint8Array(rows * columns);
  for (let y = 0; y < rows; y++) for (let x = 0; x < columns; x++) {
    const Y = wraps ? (top + y + height) % height : top + y, X = wraps ? (left + x + width) % width : left + x;
    if (Y < 0 || X < 0 || Y >= height || X >= width) { outside[y * columns + x] = 1; continue; }
    for (let c = 0; c < channels; c++) data[(c * rows + y) * columns + x] = canvas.data[(c * height + Y) * width + X];
  }
  return { shape: [channels, rows, columns], data, outside };
}

// Patch (i, j) of (C, H, W): every rows-th and columns-th pixel, as (C, h, w); `outside` as in `crop`.
export function patch(canvas, n, [rows, columns], height, width) {
  const [channels, H, W] = canvas.shape, data = new Float32Array(channels * height * width), outside = new Uint8Array(height * width);
  const i = Math.floor(n / columns), j = n % columns;
  for (let c = 0, o = 0; c < channels; c++) for (let y = 0; y < height; y++) for (let x = 0; x < width; x++, o++) {
    const Y = y * rows + i, X = x * columns + j;
    if (Y < H && X < W) data[o] = canvas.data[(c * H + Y) * W + X]; else outside[y * width + x] = 1;
  }
  return { shape: [channels, height, width], data, outside };
}

// The difference of two of the same shape at each pixel, as a root mean square over the channels: {shape: [H, W], data}.
export function distance(a, b) {
  const [channels, height, width] = a.shape, size = height * width, data = new Float32Array(size);
  for (let p = 0; p < size; p++) {
    let sum = 0;
    for (let c = 0; c < channels; c++) sum += (a.data[c * size + p] - b.data[c * size + p]) ** 2;
    data[p] = Math.sqrt(sum / channels);
  }
  return { shape: [height, width], data };
}

export function same(a, b) {
  return a && b && a.shape.length === b.shape.length && a.shape.every((side, i) => side === b.shape[i]);
}

// The root mean square of finite values.
export function rms(data) {
  let sum = 0, number = 0;
  for (const value of data) if (Number.isFinite(value)) { sum += value * value; number++; }
  return number ? Math.sqrt(sum / number) : NaN;
}

// The greatest finite value, above 0, for the end of a scale.
export function greatest(data) {
  let most = 1e-9;
  for (const value of data) if (Number.isFinite(value) && value > most) most = value;
  return most;
}
