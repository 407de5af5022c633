/** Colours, and pictures on a canvas that are sharp on every screen. Blue and orange, which colour-blind people tell apart. */

/** A colour of style.css, by the name of its variable. */
export const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

/** Set the canvas to `width` × `height` CSS pixels and return its context, with the page's font. */
export function prepare(canvas, width, height) {
  const ratio = devicePixelRatio || 1;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  canvas.style.setProperty("width", `${width}px`);
  canvas.style.setProperty("height", `${height}px`);
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  context.font = "13px ui-monospace, Menlo, Consolas, monospace";
  context.textAlign = "center";
  context.textBaseline = "middle";
  return context;
}

/** Mix two colours "#rrggbb"; `share` 0 is the first, 1 the second. */
export function mix(from, to, share) {
  const part = (hex, i) => parseInt(hex.slice(1 + 2 * i, 3 + 2 * i), 16);
  const channel = (i) => Math.round(part(from, i) + (part(to, i) - part(from, i)) * Math.min(1, Math.max(0, share)));
  return `rgb(${channel(0)}, ${channel(1)}, ${channel(2)})`;
}

/** −largest … 0 … largest → orange … neutral … blue. */
export function diverging(value, largest, palette = readPalette()) {
  if (!largest || !Number.isFinite(value)) return palette.paper;
  return mix(palette.paper, value < 0 ? palette.orange : palette.blue, Math.abs(value) / largest);
}

/** The colours of a heat map, read once for each picture: reading them for each cell would be slow. */
export const readPalette = () => ({ paper: colour("cell"), blue: colour("heat-blue"), orange: colour("heat-orange") });

/** Draw a matrix as coloured cells at (left, top), `size` pixels wide and `height` high. null is left empty. */
export function drawCells(context, matrix, size, left, top, largest, height = size) {
  const palette = readPalette();
  const gap = size > 8 ? 1 : 0;
  matrix.forEach((row, i) =>
    row.forEach((value, j) => {
      if (value === null) return;
      context.fillStyle = diverging(value, largest, palette);
      context.fillRect(left + j * size, top + i * height, size - gap, height - gap);
    }),
  );
}
