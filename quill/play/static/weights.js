/** Panel "The numbers it learned": one matrix as a heat map, its gradient, and how often each size occurs. */

import { ask, oneAtATime, query } from "./api.js";
import { colour, drawCells, prepare } from "./canvas.js";
import { $, complain, count, fill, fixed, minus } from "./dom.js";
import { change, momentOf, on, ready, view } from "./store.js";

let answer = null; // of /api/matrix
let of = ""; // the run whose matrices are offered
let offering = false;

/** Wire the panel. */
export function start() {
  $("matrix").onchange = () => change({ matrix: $("matrix").value });
  $("kind").onchange = draw;
  $("heat").onpointermove = tellCell;
  on("matrix", () => {
    if ($("matrix").value !== view.matrix) $("matrix").value = view.matrix;
    if (!offering) refresh();
  });
  on("theme", () => answer && draw());
}

/** Offer every matrix of the run. */
async function offer(run) {
  const { parts } = await ask(query("/api/network", { name: run.name, step: momentOf(run, view.step) }));
  const matrices = parts
    .filter(({ matrix }) => matrix)
    .map(({ matrix }) => [matrix, matrix.replace("transformer.", "").replace(".weight", "")]);
  fill($("matrix"), matrices, view.matrix);
  of = run.name;
  offering = true; // the caller loads the matrix itself
  change({ matrix: $("matrix").value });
  offering = false;
}

/** Load the values of the chosen matrix. */
export const refresh = oneAtATime(async () => {
  const { run } = view;
  if (!run || !ready(run)) return;
  try {
    if (of !== run.name) await offer(run);
    answer = await ask(query("/api/matrix", { name: run.name, step: momentOf(run, view.step), matrix: view.matrix }));
    complain($("weights"), "");
    draw();
  } catch (error) {
    complain($("weights"), error.message);
  }
}, "weights");

/** The matrix that is shown: values or gradient, or null. */
const shown = () => ($("kind").value === "gradient" ? answer.gradient : answer.values);

function draw() {
  if (!answer) return;
  const matrix = shown();
  $("histogram").hidden = !matrix;
  if (!matrix) {
    prepare($("heat"), 200, 8);
    $("heat-key").textContent = "No gradient here: it is written for the newest weights of a run that trains.";
    $("heat").setAttribute("aria-label", $("heat-key").textContent);
    $("histogram-key").textContent = "";
    return;
  }
  const names = answer.row_names && answer.row_names.length === matrix.length ? answer.row_names : null;
  const { size, margin } = layout(matrix, names);
  const context = prepare($("heat"), margin + size * matrix[0].length, size * matrix.length);
  const largest = Math.max(...matrix.flat().map(Math.abs));
  drawCells(context, matrix, size, margin, 0, largest);
  context.fillStyle = colour("ink");
  context.textAlign = "right";
  if (size < 12) context.font = `${Math.max(9, size)}px ui-monospace, monospace`;
  names?.forEach((name, i) =>
    context.fillText(name.startsWith("<") ? "·" : name.slice(0, 4), margin - 6, (i + 0.5) * size),
  );
  const small = answer.shrunk ? ", each cell the mean of a block" : "";
  const sizes = answer.shape.join(" × ");
  $("heat-key").textContent =
    `${sizes}${small}. Blue: above 0, orange: below 0, the largest absolute value is ${fixed(largest, largest < 0.01 ? 6 : 3)}.`;
  $("heat").setAttribute("aria-label", `${view.matrix}: ${$("heat-key").textContent}`);
  drawHistogram($("kind").value === "gradient" ? answer.gradient_histogram : answer.histogram);
}

/** The pixels of a cell and the room for the tokens' names. */
function layout(matrix, names) {
  const margin = names ? 40 : 0;
  const width = Math.min(660, $("weights").clientWidth - 44);
  const widest = matrix.length === 1 ? 24 : 14;
  const size = Math.min(widest, (width - margin) / matrix[0].length, 420 / matrix.length);
  return { margin, size: size < 4 ? Math.max(2, size) : Math.floor(size) };
}

/** Bars for how many weights have each size. */
function drawHistogram(histogram) {
  if (!histogram) return;
  const { edges, counts } = histogram;
  const [width, height] = [Math.max(180, $("histogram").parentElement.clientWidth), 110];
  const context = prepare($("histogram"), width, height);
  const most = Math.max(...counts);
  counts.forEach((number, i) => {
    const h = (number / most) * (height - 4);
    context.fillStyle = colour((edges[i] + edges[i + 1]) / 2 < 0 ? "heat-orange" : "heat-blue");
    context.fillRect((i * width) / counts.length, height - h, width / counts.length - 1, h);
  });
  const text = `${count(counts.reduce((a, b) => a + b, 0))} numbers from ${minus(edges[0].toPrecision(3))} to ${minus(edges.at(-1).toPrecision(3))}; mean ${minus(answer.mean.toPrecision(2))}, standard deviation ${answer.std.toPrecision(3)}.`;
  $("histogram-key").textContent = $("kind").value === "gradient" ? text.split(";")[0] : text;
  $("histogram").setAttribute("aria-label", `Histogram: ${$("histogram-key").textContent}`);
}

/** Read out the number under the pointer. */
function tellCell(event) {
  const matrix = answer && shown();
  if (!matrix) return;
  const names = answer.row_names?.length === matrix.length ? answer.row_names : null;
  const { size, margin } = layout(matrix, names);
  const [i, j] = [Math.floor(event.offsetY / size), Math.floor((event.offsetX - margin) / size)];
  const value = matrix[i]?.[j];
  if (value !== undefined)
    $("heat-key").textContent = `row ${names ? names[i] : i}, column ${j}: ${minus(value.toPrecision(4))}`;
}
