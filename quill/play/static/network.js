/** Panel "What it is made of": every part with its shape and its parameters. A click shows its numbers. */

import { ask, oneAtATime, query } from "./api.js";
import { drawCells, colour, prepare } from "./canvas.js";
import { $, complain, count, el, fixed } from "./dom.js";
import { change, momentOf, on, ready, view } from "./store.js";

const WORDS = {
  // what a part does, by the end of its name
  wte: "a vector for each token",
  wpe: "a vector for each position",
  c_attn: "queries, keys, values",
  "attn.c_proj": "mixes the heads",
  attn: "looks back",
  c_fc: "to a wider layer",
  "mlp.c_proj": "back to n_embd",
  mlp: "applied to each position",
  lm_head: "scores every token",
};
const MOST = 64; // cells in a row
let of = ""; // the run whose parts are shown

/** Wire the panel. */
export function start() {
  on("matrix", mark);
  on("inside theme", drawWay);
}

/** Load the parts; they change only with the run. */
export const refresh = oneAtATime(async () => {
  if (!view.run || !ready(view.run) || of === view.run.name) return;
  const name = view.run.name;
  try {
    const { parts } = await ask(query("/api/network", { name, step: momentOf(view.run, view.step) }));
    of = name;
    complain($("network"), "");
    show(parts);
  } catch (error) {
    complain($("network"), error.message);
  }
}, "network");

/** What a part does in a word or two. */
function words(name) {
  const key = Object.keys(WORDS).find((end) => name === end || name.endsWith(`.${end}`));
  return key ? WORDS[key] : "";
}

/** The last part of a name; a block's is its number. */
function label(name) {
  const last = name.split(".").at(-1);
  return /^\d+$/.test(last) ? `block ${last}` : last || "GPT";
}

function show(parts) {
  const most = Math.max(1, ...parts.filter(({ matrix }) => matrix).map(({ parameters }) => parameters));
  $("parts").replaceChildren(...parts.map((part) => line(part, most)));
  mark();
}

/** A part: a button if it has numbers to show. */
function line({ name, kind, shape, parameters, depth, tied, matrix }, most) {
  const size = shape?.length ? shape.join(" × ") : "";
  const cells = [
    el("b", { textContent: label(name) }),
    el("span", { className: "word", textContent: words(name) || kind }),
    el("span", { textContent: size }),
    el("span", { className: "number", textContent: parameters ? count(parameters) : "" }),
  ];
  if (tied) cells[1].textContent += " (the same numbers as wte)";
  const node = matrix
    ? el("button", { type: "button", title: `${name} (${kind})`, onclick: () => change({ matrix }) }, ...cells)
    : el("div", { title: `${name} (${kind})` }, ...cells);
  node.style.setProperty("--share", matrix && parameters ? parameters / most : 0);
  node.style.setProperty("--depth", depth);
  if (matrix) node.dataset.matrix = matrix;
  return el("li", {}, node);
}

/** Draw the vector of the text's last token after each part: a row of cells each. */
function drawWay() {
  const { vectors, tokens } = view.inside ?? {};
  if (!vectors) return;
  const names = Object.keys(vectors);
  const rows = names.map((name) => shrink(vectors[name], MOST));
  const margin = 86;
  const size = Math.max(2, Math.min(18, Math.floor(($("network").clientWidth - 44 - margin) / rows[0].length)));
  const height = Math.max(size, 16);
  const context = prepare($("way"), margin + size * rows[0].length, height * rows.length);
  rows.forEach((row, i) => {
    drawCells(context, [row], size, margin, i * height, Math.max(...row.map(Math.abs)), height - 2); // a scale for each row
    context.fillStyle = colour("ink");
    context.textAlign = "right";
    context.font = "12px ui-monospace, Menlo, Consolas, monospace";
    context.fillText(names[i], margin - 6, i * height + height / 2);
  });
  const lengths = names.map((name) => `${name} ${fixed(Math.hypot(...vectors[name]), 2)}`).join(", ");
  $("way-key").textContent = `The vector of “${tokens.at(-1)}”. Lengths: ${lengths}.`;
  $("way").setAttribute("aria-label", $("way-key").textContent);
}

/** At most `most` numbers: the means of neighbours. */
function shrink(numbers, most) {
  const n = Math.min(most, numbers.length);
  return Array.from({ length: n }, (_, i) => {
    const part = numbers.slice(Math.floor((i * numbers.length) / n), Math.floor(((i + 1) * numbers.length) / n));
    return part.reduce((a, b) => a + b, 0) / part.length;
  });
}

/** Mark the part whose numbers the weights panel shows. */
function mark() {
  for (const node of $("parts").querySelectorAll("[data-matrix]")) {
    node.setAttribute("aria-pressed", String(node.dataset.matrix === view.matrix));
  }
}
