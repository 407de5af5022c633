/** Panel "What comes next?": a text → ids → attention → logits → bars → the wheel. */

import { ask, oneAtATime } from "./api.js";
import * as attention from "./attention.js";
import { $, announce, complain, complainOfText, el, fixed, plain } from "./dom.js";
import { probabilities } from "./sampling.js";
import { change, knownTokens, momentOf, on, ready, view } from "./store.js";
import * as wheel from "./wheel.js";

const SHOWN = 10; // bars before "show all"
const END = "<end>";
let answer = null; // of /api/token for the run
let beside = null; // … for the pinned run, with the run; or null
let probs = [];
let writing = false;

/** Wire the panel. */
export function start() {
  attention.start();
  wheel.start(mark);
  $("text").oninput = () => change({ text: $("text").value });
  $("temperature").oninput = $("top-k").oninput = $("top-p").oninput = readSliders;
  $("more").onclick = () => {
    $("more").ariaExpanded = String($("more").ariaExpanded !== "true");
    drawBars();
  };
  $("draw").onclick = () => stopWriting() || wheel.spin().then(() => announce($("drawn").textContent));
  $("add").onclick = () => stopWriting() || add();
  $("write").onclick = () => stopWriting() || write();
  on("text layer head", refresh);
  on("temperature top_k top_p", redraw);
  on("theme", () => answer && drawBars());
  readSliders();
}

/** Sliders → view; the last position of top-k and top-p means that nothing is dropped. */
function readSliders() {
  const [k, p] = [Number($("top-k").value), Number($("top-p").value)];
  const top_k = k >= Number($("top-k").max) ? null : k;
  const top_p = p >= 1 ? null : p;
  $("temperature-value").textContent = Number($("temperature").value).toFixed(2);
  $("top-k-value").textContent = top_k ?? "all";
  $("top-p-value").textContent = top_p === null ? "all" : p.toFixed(2);
  change({ temperature: Number($("temperature").value), top_k, top_p });
}

/** What is asked for a run. */
function question(run) {
  const { text, layer, head, temperature, top_k, top_p } = view;
  const [layers, heads] = [run.options?.n_layer ?? 1, run.options?.n_head ?? 1];
  const place = { layer: Math.min(layer, Math.max(0, layers - 1)), head: Math.min(head, heads - 1) };
  return ask("/api/token", {
    name: run.name,
    step: momentOf(run, view.step),
    text,
    ...place,
    temperature,
    top_k,
    top_p,
  });
}

/** Load the numbers of the run and of the pinned one. Errors are shown in the panel. */
export const refresh = oneAtATime(async () => {
  if (!view.run || !ready(view.run)) return;
  try {
    const [run, pinned] = [view.run, view.pinned]; // they may change before the answers come
    answer = { ...(await question(run)), run };
    beside = pinned && { ...(await question(pinned).catch(() => ({ choices: [] }))), run: pinned };
    complain($("token"), "");
  } catch (error) {
    complainOfText($("token"), error.message, knownTokens());
    return;
  }
  $("top-k").max = answer.choices.length;
  if (view.top_k === null) $("top-k").value = answer.choices.length;
  $("ids").replaceChildren(
    ...answer.tokens.map((token, i) =>
      el("li", {}, el("b", { textContent: token }), el("span", { textContent: answer.ids[i] })),
    ),
  );
  $("ids").scrollLeft = $("ids").scrollWidth;
  attention.show(answer);
  change({ inside: answer });
  drawBars();
}, "token");

/** New probabilities: from the logits at once, if all are here; else the server knows the others' share. */
function redraw() {
  if (!answer) return;
  if (answer.choices.length < answer.run.vocab_size) refresh();
  else drawBars();
}

/** The probabilities of an answer's choices, in their order. */
function probsOf(of) {
  if (of.choices.length < of.run.vocab_size) return of.choices.map((choice) => choice.probability);
  return probabilities(
    of.choices.map((choice) => choice.logit),
    view.temperature,
    view.top_k,
    view.top_p,
  );
}

/** Draw a bar for each of the likeliest tokens: token, logit, logit / T, softmax. */
function drawBars() {
  probs = probsOf(answer);
  const other = beside && new Map(probsOf(beside).map((p, i) => [beside.choices[i].token, p]));
  const all = $("more").ariaExpanded === "true";
  const rows = answer.choices.slice(0, all ? answer.choices.length : SHOWN);
  const head = el(
    "div",
    { role: "row", className: "head" },
    ...["token", "logit", "÷ T", "softmax", ""].map((text) => el("span", { role: "columnheader", textContent: text })),
  );
  $("bars").replaceChildren(head, ...rows.map((choice, i) => bar(choice, probs[i], other?.get(choice.token))));
  const rest = probs.slice(rows.length).reduce((a, b) => a + b, 0);
  $("more").hidden = answer.choices.length <= SHOWN;
  $("more").textContent = all
    ? "Show fewer"
    : `Show all ${answer.choices.length}: the others have ${(100 * rest).toFixed(1)} %`;
  wheel.show(
    answer.choices.map((choice) => choice.token),
    probs,
  );
}

/** One row. `p` is the run's probability, `other` the pinned run's. */
function bar(choice, p, other) {
  const cell = (text, name = "") => el("span", { role: "cell", className: name, textContent: text });
  const ink = el("span", { className: "ink" });
  ink.style.setProperty("--p", p);
  const track = el("span", { role: "cell", className: "track", "aria-hidden": "true" }, ink);
  if (other !== undefined) {
    const second = el("span", { className: "ink second" });
    second.style.setProperty("--p", other);
    track.append(second);
  }
  const row = el(
    "div",
    { role: "row" },
    cell(choice.token, "token"),
    cell(fixed(choice.logit, 2)),
    cell(fixed(choice.logit / view.temperature, 2)),
  );
  row.dataset.p = p;
  row.dataset.token = choice.token;
  row.append(cell(`${(100 * p).toFixed(1)} %`, p ? "" : "off"), track);
  return row;
}

/** Mark the bar that n points at. */
function mark(index) {
  [...$("bars").children].slice(1).forEach((row, i) => row.classList.toggle("chosen", i === index));
  const ended = answer.choices[index].token === END;
  $("add").textContent = ended ? "Restart" : `Add “${answer.choices[index].token}”`;
}

/** Append the chosen token to the text; after the end, begin again with nothing. */
async function add() {
  const { token } = answer.choices[wheel.chosen()];
  $("text").value = token === END ? "" : view.text + plain(token);
  change({ text: $("text").value });
  await refresh();
}

/** Draw and add until the end of the text, or until somebody presses a button. */
async function write() {
  writing = true;
  $("write").textContent = "Stop";
  for (let i = 0; writing && i < 200; i++) {
    await wheel.spin();
    if (!writing || answer.choices[wheel.chosen()].token === END) break;
    await add();
    if (!$("token").querySelector(".message").hidden) break; // the server refuses the text
  }
  stopWriting();
}

/** Stop writing on. → whether it was. */
function stopWriting() {
  const was = writing;
  writing = false;
  $("write").textContent = "Write on";
  return was;
}
