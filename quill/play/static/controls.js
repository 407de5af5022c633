/** The head of the page: which run is shown, its counts, train, pause, one step. */

import { ask, query } from "./api.js";
import { $, announce, complain, count, fill, reword } from "./dom.js";
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
const MOMENT = 2000; // milliseconds that a step of a waiting run may take before the next click counts
const PATIENCE = 20_000; // milliseconds of starting, until the last line of the log says more
let open = null; // shows another run: main.js
let working = false; // two clicks are one run
let steps = 0; // clicks on One step that are not answered yet: each is a step
let idle = {}; // the run that is shown, when it was last seen without a process: its name, its step, and the time

/** Wire the head; `show` opens a run by its name or its run object. */
export function start(show) {
  open = show;
  $("run").onchange = () => show($("run").value);
  $("train").onclick = () => tried(view.run.status === "running" ? PAUSING : "Asking for training …", train);
  $("step").onclick = () => ++steps && tried("Taking one step …", oneStep);
  $("anew").onclick = () => tried("Starting anew …", () => startAnew());
  on("run runs lost", describe);
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
  steps = 0;
  buttons.forEach((button) => button.removeAttribute("aria-disabled"));
  describe();
}

const control = async (action) => open(await ask("/api/control", { name: view.run.name, action }));

/** Start a run like this one. */
async function startAnew(paused = false) {
  await open(await ask("/api/start", { ...form.likeShown(), paused }));
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
  for (; steps > 0; steps--) {
    const { step, status } = view.run;
    await control("step");
    const end = performance.now() + MOMENT;
    while (status === "waiting" && view.run.step === step && performance.now() < end)
      await new Promise((done) => setTimeout(done, 20));
  }
}

/** Show the run's status and its counts. The live region hears about the status only. */
function describe() {
  const { run, runs, lost } = view;
  if (!run) return;
  const known = runs.some(({ name }) => name === run.name);
  const gone = lost !== null && !known; // its folder was deleted or renamed
  const others = runs.map(({ name, title }) => [name, title || name]);
  fill($("run"), known ? others : [[run.name, gone ? `${run.name} (deleted)` : run.name], ...others], run.name);
  const active = run.status === "running";
  $("train").textContent = active ? "❚❚ Pause" : run.status === "finished" ? "▶ Train again" : "▶ Train";
  $("train").disabled = $("anew").disabled = gone;
  $("step").disabled = active || gone;
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
  const told = tell(run);
  const rate = run.evaluations.at(-1)?.tokens_per_s;
  const speed = told === WORDS.running && rate ? ` ${count(Math.round(rate))} tokens a second.` : "";
  const words = lost ?? `${run.title || run.name}: ${told}`;
  const pending = !ready(run);
  const classes = { pending, empty: pending && hasEnded(run), lost: lost !== null, failed: failure(run) };
  for (const [name, holds] of Object.entries(classes)) document.body.classList.toggle(name, Boolean(holds));
  if (!working) $("status").textContent = lost ?? `${words}${speed} ${run.note || ""}`;
  announce(words);
}

/** What the run does, or how it ended. */
function tell(run) {
  if (run.status !== "running" || run.name !== idle.name) {
    const inMemory = ["running", "waiting"].includes(run.status); // then its next step needs no new process
    idle = { name: run.name, step: inMemory ? null : run.step, since: performance.now() };
  }
  if (run.status === "running" && (!ready(run) || run.step === idle.step))
    return performance.now() - idle.since > PATIENCE && run.log ? `starting: ${lastLine(run)}` : STARTING;
  const reason = failure(run);
  if (reason) return `failed: ${reason}`;
  if (run.status === "paused" && (run.log ? !/^stopped (by|early)/.test(lastLine(run)) : !ready(run))) {
    const saved = run.evaluations.length || /^stopped by/m.test(run.log);
    return saved
      ? `stopped unexpectedly at step ${count(run.step)}. Train goes on from its last checkpoint.`
      : `ended without a checkpoint at step ${count(run.step)}. Train begins again.`;
  }
  const chosen = run.status === "bundled" && view.setup.selected_config; // the argument of play.py
  return WORDS[run.status] + (chosen ? ` Press Train to train ${chosen}.` : "");
}

const lastLine = (run) => run.log.trim().split("\n").at(-1);

const hasEnded = (run) => ["paused", "finished"].includes(run.status);

/** Why the run failed, in the page's words; "" if it did not. */
export const failure = (run) => (hasEnded(run) ? reword(run.error ?? "") : "");

/** Ask for the list of runs. */
export async function listRuns() {
  return (await ask(query("/api/runs", {}))).runs;
}
