/** Panel "What it is made of": every part with its shape and its parameters. A click shows its numbers. */

import { ask, oneAtATime, query } from "./api.js";
import { $, complain, count, el } from "./dom.js";
import { change, momentOf, on, ready, view } from "./store.js";

const WORDS = { // what a part does, by the end of its name
  wte: "a vector for each token",
  wpe: "a vector for each position",
  c_attn: "queries, keys, values",
  "attn.c_proj": "mixes the heads",
  attn: "looks back",
  c_fc: "to a wider layer",
  "mlp.c_proj": "and back",
  mlp: "thinks about each token",
  lm_head: "scores every token",
};
let of = ""; // the run whose parts are shown

/** Wire the panel. */
export function start() {
  on("matrix", mark);
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
});

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

/** Mark the part whose numbers the weights panel shows. */
function mark() {
  for (const node of $("parts").querySelectorAll("[data-matrix]")) {
    node.setAttribute("aria-pressed", String(node.dataset.matrix === view.matrix));
  }
}
