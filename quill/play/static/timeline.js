/** The slider over the saved steps: it moves samples, attention, bars, table and weights to one moment of the training. */

import { $, count, fixed } from "./dom.js";
import { change, momentOf, on, view } from "./store.js";

const PACE = 450; // milliseconds for each saved step, at most
const REPLAY = 8000; // … and for all of them
let playing = false;

/** Wire the slider. */
export function start() {
  $("moment").oninput = () => {
    playing = false;
    choose(Number($("moment").value));
  };
  $("newest").onclick = () => {
    playing = false;
    change({ step: null });
  };
  $("replay").onclick = play;
  on("run step", show);
}

/** Take the position `index` of the slider: a saved step, or the newest weights at its end. */
function choose(index) {
  const saved = view.run.snapshots;
  change({ step: index < saved.length ? saved[index] : null });
}

/** Move from the first saved step to the newest. Pressed again, stop. */
async function play() {
  playing = !playing;
  const first = view.step === null ? 0 : Number($("moment").value);
  for (let i = first; playing && view.run && i <= view.run.snapshots.length; i++) {
    choose(i);
    await new Promise((done) => setTimeout(done, Math.min(PACE, REPLAY / view.run.snapshots.length)));
  }
  playing = false;
  show();
}

/** The loss at a step: the evaluation there, else the training loss nearby. */
function lossAt(run, step) {
  const evaluation = run.evaluations.find((one) => one.step === step);
  if (evaluation) return `, validation loss ${fixed(evaluation.val_loss)}`;
  const i = run.curve.step.findIndex((one) => one >= step);
  return i < 0 || step === 0 ? "" : `, loss of the batch ${fixed(run.curve.loss[i], 2)}`;
}

/** Show where the slider is. */
function show() {
  const { run, step } = view;
  if (!run) return;
  const saved = run.snapshots;
  const none = saved.length < 2;
  $("moment").max = saved.length;
  $("moment").disabled = $("replay").disabled = none;
  $("newest").disabled = none || step === null;
  $("moment").value = step === null ? saved.length : saved.findLastIndex((one) => one <= step);
  $("replay").textContent = playing ? "❚❚ Stop" : "▶ Replay";
  $("replay").ariaLabel = playing ? "Stop the replay" : "Replay the training from its first saved step";
  const at = momentOf(run, step) ?? run.step; // a run deletes saved steps when there are too many
  const text = `Step ${count(at)} of ${count(run.max_iters ?? run.step)}${lossAt(run, at)}`;
  $("when").textContent =
    none && run.status === "bundled" ? "A trained model. Press Train to see a new one learn." : text;
  $("moment").setAttribute("aria-valuetext", text);
}
