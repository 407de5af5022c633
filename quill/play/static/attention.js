/** The triangle: how much each token (a row) looks at itself and at those before it (the columns). */

import { colour, drawCells, prepare } from "./canvas.js";
import { $, fill, fixed } from "./dom.js";
import { change, on, view } from "./store.js";

const SMALLEST = 7; // pixels of a cell
const STAGES = { "q kᵀ": "q kᵀ", "q kᵀ / √D": "÷ √D", "with the mask": "mask", softmax: "softmax" };
let shown = null; // the last answer of /api/token

/** Wire the choosers. */
export function start() {
  fill($("stage"), Object.entries(STAGES), "softmax");
  $("layer").onchange = () => change({ layer: Number($("layer").value) });
  $("head").onchange = () => change({ head: Number($("head").value) });
  $("stage").onchange = draw;
  $("attention").onpointermove = (event) => tellCell(event);
  on("theme", draw);
}

/** Show the attention of `answer`, an answer of /api/token. */
export function show(answer) {
  shown = answer;
  const numbers = (n) => Array.from({ length: Math.max(n, 1) }, (_, i) => [i, `${i}`]);
  fill($("layer"), numbers(answer.n_layer), view.layer);
  fill($("head"), numbers(answer.n_head), view.head);
  draw();
}

/** The pixels of a cell, the room for the letters, and the matrix. */
function layout() {
  const isMasked = ["softmax", "with the mask"].includes($("stage").value); // then the upper triangle stays empty
  const matrix = shown.attention[$("stage").value].map((row, i) =>
    row.map((value, j) => (isMasked && j > i ? null : value)),
  );
  const T = matrix.length;
  const longest = Math.max(...shown.tokens.slice(-T).map((token) => token.length));
  const margin = Math.min(68, 10 + longest * 8);
  const width = Math.max(180, Math.min($("attention").parentElement.clientWidth, 300));
  const size = Math.max(SMALLEST, Math.min(36, (width - margin) / T));
  return { matrix, T, margin, size };
}

function draw() {
  if (!shown) return;
  $("layer").closest(".row").hidden = !shown.attention;
  if (!shown.attention) {
    prepare($("attention"), 180, 20);
    $("attention-key").textContent = "This model has no attention: it sees the last token only.";
    $("attention").setAttribute("aria-label", $("attention-key").textContent);
    return;
  }
  const { matrix, T, margin, size } = layout();
  const context = prepare($("attention"), margin + T * size, 20 + T * size);
  const values = matrix.flat().filter((value) => value !== null);
  const isSoftmax = $("stage").value === "softmax";
  const largest = isSoftmax ? 1 : Math.max(...values.map(Math.abs));
  // The root of a weight: over many tokens, weights are small, and would all look like 0.
  const shade = (value) => (isSoftmax && value !== null ? Math.sqrt(value) : value);
  drawCells(
    context,
    matrix.map((row) => row.map(shade)),
    size,
    margin,
    20,
    largest,
  );
  context.fillStyle = colour("ink");
  const names = shown.tokens.slice(-T);
  const every = Math.ceil(13 / size); // leave out letters that would overlap
  names.forEach((name, i) => {
    if (i % every) return;
    const short = name.length > 3 ? `${name.slice(0, name.startsWith("<") ? 7 : 3)}` : name;
    context.textAlign = "right";
    context.fillText(short, margin - 6, 20 + (i + 0.5) * size);
    context.textAlign = "center";
    context.fillText(name.startsWith("<") ? "·" : short, margin + (i + 0.5) * size, 10);
  });
  describe(T - 1);
}

/** Say in words what row `i` looks at; also the picture's text alternative. */
function describe(i, j = null) {
  const { matrix, T } = layout();
  const names = shown.tokens.slice(-T);
  const most =
    j ?? matrix[i].reduce((best, value, k) => (value !== null && value > (matrix[i][best] ?? -Infinity) ? k : best), 0);
  const verb = j === null ? "looks most at" : "→";
  const first = shown.tokens.length - T; // positions count from 0, as in the whole text
  const text = `“${names[i]}” (${first + i}) ${verb} “${names[most]}” (${first + most}): ${matrix[i][most] === null ? "hidden by the mask" : fixed(matrix[i][most], 2)}`;
  $("attention-key").textContent = text;
  $("attention").setAttribute("aria-label", `Attention of layer ${view.layer}, head ${view.head}: ${text}`);
}

/** Read out the cell under the pointer. */
function tellCell(event) {
  if (!shown?.attention) return;
  const { T, margin, size } = layout();
  const [i, j] = [Math.floor((event.offsetY - 20) / size), Math.floor((event.offsetX - margin) / size)];
  if (i >= 0 && i < T && j >= 0 && j < T) describe(i, j);
}
