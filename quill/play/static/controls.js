/** The head of the page: which run is shown, its counts, train, pause, one step. */

import { ask, query } from "./api.js";
import { $, announce, complain, count, fill } from "./dom.js";
import * as form from "./newrun.js";
import { on, ready, view } from "./store.js";

const WORDS = {
  bundled: "ready to play with.",
  running: "training …",
  waiting: "waiting for the next step.",
  paused: "paused.",
  finished: "finished. Press Replay to watch it learn.",
};
const PAUSING = "Pausing: the run ends its step and writes a checkpoint …";
const STARTING = "starting: Python reads torch and the data, a few seconds …";
let open = null; // shows another run: main.js
let working = false; // two clicks are one run

/** Wire the head; `show` opens a run by its name or its run object. */
export function start(show) {
  open = show;
  $("run").onchange = () => show($("run").value);
  $("train").onclick = () => tried(view.run.status === "running" ? PAUSING : "Asking for training …", train);
  $("step").onclick = () => tried("Taking one step …", oneStep);
  $("anew").onclick = () => tried("Starting anew …", () => startAnew());
  on("run runs", describe);
}

/** Do `work`, say so meanwhile, and show what went wrong under the buttons. */
async function tried(words, work) {
  if (working) return;
  working = true;
  complain($("error"), "");
  $("status").textContent = words;
  const buttons = ["train", "step", "anew"].map($);
  buttons.forEach((button) => button.setAttribute("aria-disabled", "true"));
  try {
    await work();
  } catch (error) {
    complain($("error"), error.message);
  }
  working = false;
  buttons.forEach((button) => button.removeAttribute("aria-disabled"));
  describe();
}

const control = async (action) => open(await ask("/api/control", { name: view.run.name, action }));

/** Start a run like this one; what the form says holds if it starts from this run. */
async function startAnew(paused = false) {
  await open(await ask("/api/start", { ...form.request(), paused }));
}

/** Train or pause, as the run's status has it. */
async function train() {
  const { status } = view.run;
  if (status === "running") return control("pause");
  if (status === "paused" || status === "waiting") return control("train");
  return startAnew();
}

/** One step of this run; a bundled or a finished run cannot go on, so a new one waits at step 0 for its first. */
async function oneStep() {
  if (["bundled", "finished"].includes(view.run.status)) await startAnew(true);
  await control("step");
}

/** Show the run's status and its counts. The live region hears about the status only. */
function describe() {
  const { run, runs } = view;
  if (!run) return;
  fill(
    $("run"),
    runs.map(({ name, title }) => [name, title || name]),
    run.name,
  );
  const active = run.status === "running";
  $("train").textContent = active ? "❚❚ Pause" : run.status === "finished" ? "▶ Train again" : "▶ Train";
  $("step").disabled = active;
  const numbers = [
    [run.documents, "documents"],
    [run.documents ? null : run.train_tokens, "tokens of text"],
    [run.vocab_size, "different tokens"],
    [run.parameters, "parameters"],
  ];
  $("counts").textContent = numbers
    .filter(([number]) => number)
    .map(([number, unit]) => `${count(number)} ${unit}`)
    .join(" · ");
  const rate = run.evaluations.at(-1)?.tokens_per_s;
  const speed = active && rate ? ` ${count(Math.round(rate))} tokens a second.` : "";
  const chosen = run.status === "bundled" && view.setup.selected_config; // the argument of play.py
  const hint = chosen ? ` Press Train to train ${chosen}.` : "";
  const words = active && !ready(run) ? STARTING : (WORDS[run.status] ?? run.status) + hint;
  document.body.classList.toggle("pending", !ready(run));
  if (!document.body.classList.contains("lost"))
    $("status").textContent = `${run.title || run.name}: ${words}${speed} ${run.note || ""}`;
  announce(`${run.title || run.name}: ${words}`);
  failed(run);
}

/** A run that ended before its first step says why in its log. */
function failed(run) {
  const ended = ["paused", "finished"].includes(run.status) && run.step === 0;
  const reason = run.error || (ended ? (run.log || "").trim().split("\n").at(-1) : "");
  if (reason && !reason.startsWith("stopped by")) complain($("error"), reason);
}

/** Ask for the list of runs. */
export async function listRuns() {
  return (await ask(query("/api/runs", {}))).runs;
}
