/** Lessons 0 to 8: the ladder's rungs. Before each, a guess of the loss; after it, guess, result and measured loss. */

import { ask } from "./api.js";
import { $, complain, el, fixed } from "./dom.js";
import { choose } from "./newrun.js";
import { on, view } from "./store.js";

const guesses = new Map(); // the run that a lesson started → { guess, lesson }

/** Build the list; `show` opens the run that a lesson starts. */
export function start({ lessons }, show) {
  $("lesson-list").replaceChildren(...lessons.map((lesson) => card(lesson, show)));
  on("run", () => finished(view.run));
}

/** One lesson: its text, the field for the guess, and the result. */
function card(lesson, show) {
  const guess = el("input", {
    type: "number",
    step: "0.01",
    min: 0,
    max: 20,
    required: true,
    id: `guess-${lesson.number}`,
  });
  const error = el("p", { className: "message", role: "alert", hidden: true });
  const result = el("p", { className: "result", id: `result-${lesson.number}`, "aria-live": "polite" });
  const form = el(
    "form",
    { className: "row" },
    el("label", { className: "field" }, "Your guess of its loss", guess),
    el("button", { textContent: `Guess, then train lesson ${lesson.number}` }),
  );
  form.onsubmit = async (event) => {
    event.preventDefault();
    complain(error, "");
    result.textContent = "Starting …";
    try {
      const run = await ask("/api/start", choose(lesson.config));
      guesses.set(run.name, { guess: Number(guess.value), lesson });
      result.textContent = "Training. The result comes here.";
      await show(run);
    } catch (problem) {
      result.textContent = "";
      complain(error, problem.message);
    }
  };
  const text = lesson.text.split(/\n\s*\n/).map((paragraph) => el("p", { textContent: paragraph }));
  const title = el("summary", {}, el("b", { textContent: `Lesson ${lesson.number}` }), ` ${lesson.title}`);
  return el("details", { className: "lesson" }, title, ...text, form, error, result);
}

/** Show guess, result and measured loss when the run of a lesson is finished. */
function finished(run) {
  const entry = guesses.get(run.name);
  if (!entry || run.status !== "finished" || !run.evaluations.length) return;
  const { guess, lesson } = entry;
  const { val_loss } = run.evaluations.at(-1);
  guesses.delete(run.name);
  const off = Math.abs(guess - val_loss);
  const praise = off < 0.05 ? "Spot on!" : off < 0.3 ? "Close." : "A surprise.";
  $(`result-${lesson.number}`).textContent =
    `Your guess ${fixed(guess, 2)}, this run ${fixed(val_loss)}, measured before ${fixed(lesson.measured_loss)}. ${praise}`;
}
