/** Lessons 0 to 8: the ladder's rungs. Before each, a guess of the loss; after it, guess, result and measured loss. */

import { ask } from "./api.js";
import { failure } from "./controls.js";
import { $, complain, el, fixed } from "./dom.js";
import { on, view } from "./store.js";

const guesses = JSON.parse(sessionStorage.guesses ?? "{}"); // the run that a lesson started → [the lesson's number, guess]
const CHARACTERS = 65; // of Tiny Shakespeare

/** Build the list; `show` opens the run that a lesson starts. */
export function start({ lessons }, show) {
  $("lesson-list").replaceChildren(...lessons.map((lesson, i) => card(lesson, lessons[i - 1], show)));
  on("run", () => report(view.run, lessons));
}

/** One lesson: its text, what the lesson before it reached, the field for the guess, and the result. */
function card(lesson, before, show) {
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
    el("button", { textContent: `Train lesson ${lesson.number}` }),
  );
  form.onsubmit = async (event) => {
    event.preventDefault();
    complain(error, "");
    result.textContent = "Starting …";
    try {
      const run = await ask("/api/start", { config: lesson.config });
      guesses[run.name] = [lesson.number, Number(guess.value)];
      sessionStorage.guesses = JSON.stringify(guesses);
      await show(run);
    } catch (problem) {
      result.textContent = "";
      complain(error, problem.message);
    }
  };
  const text = lesson.text.split(/\n\s*\n/).map((paragraph) => el("p", { textContent: paragraph }));
  const name = lesson.title[0].toUpperCase() + lesson.title.slice(1);
  const title = el("summary", {}, el("b", { textContent: `Lesson ${lesson.number}` }), ` ${name}`);
  const reached = before ? ` Lesson ${before.number} reached ${fixed(before.measured_loss)}.` : "";
  const anchor = `Guessing among the ${CHARACTERS} characters has a loss of ${fixed(Math.log(CHARACTERS))}.${reached}`;
  return el("details", { className: "lesson" }, title, ...text, el("p", { textContent: anchor }), form, error, result);
}

/** Say in the lesson what became of its run: guess, result and measured loss, or why it failed. */
function report(run, lessons) {
  const [number, guess] = guesses[run.name] ?? [];
  const lesson = lessons.find((one) => one.number === number);
  if (!lesson) return;
  const reason = failure(run);
  const loss = run.status === "finished" ? run.evaluations.at(-1)?.val_loss : undefined;
  let text = "Training. The result comes here.";
  if (reason) text = `The training failed: ${reason}.`;
  else if (loss !== undefined)
    text = `Your guess ${fixed(guess, 2)}, this run ${fixed(loss)}, measured before ${fixed(lesson.measured_loss)}. Off by ${fixed(Math.abs(guess - loss), 2)}.`;
  if ($(`result-${number}`).textContent !== text) $(`result-${number}`).textContent = text;
}
