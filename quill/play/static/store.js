/** What the page shows now. Whoever changes it says so, and whoever shows it listens. */

export const view = {
  setup: null, // the answer of /api/setup
  lost: null, // why the server tells nothing about the run, or null
  runs: [], // the answer of /api/runs
  run: null, // the run object that the page shows
  pinned: null, // the run object beside it, or null
  step: null, // a saved step, or null for the newest weights
  inside: null, // the last answer of /api/token: what the model computed for the text
  matrix: undefined, // the name of the matrix whose numbers are shown
  text: "", // what panel "What comes next?" continues
  layer: 0,
  head: 0,
  temperature: 0.5,
  top_k: null,
  top_p: null,
  prompt: "",
  seed: 1337,
};

const bus = new EventTarget();

/** Call `listener` when one of the keys `names` (separated by spaces) changes. */
export function on(names, listener) {
  for (const name of names.split(" ")) bus.addEventListener(name, listener);
}

/** Change keys of `view` and tell the listeners of each once. */
export function change(part) {
  const changed = Object.keys(part).filter((key) => view[key] !== part[key]);
  Object.assign(view, part);
  for (const key of changed) bus.dispatchEvent(new Event(key));
}

/** The newest saved step of `run` that is not later than `step`; null means the newest weights. */
export function momentOf(run, step) {
  if (step === null || !run.snapshots.length) return null;
  return run.snapshots.filter((saved) => saved <= step).at(-1) ?? run.snapshots[0];
}

/** Whether the run has weights to look at: a run that has just started has none for a few seconds. */
export function ready(run) {
  return (
    run.status === "bundled" ||
    run.weights_step !== null ||
    run.step > 0 ||
    run.snapshots.length > 0 ||
    run.evaluations.length > 0
  );
}

/** The tokens of the run that is shown; none if they are too many, or not here yet. */
export function knownTokens() {
  const { run, choices = [] } = view.inside ?? {};
  return run?.name === view.run.name && choices.length === run.vocab_size ? choices.map(({ token }) => token) : [];
}

/** Whether every line of the run's texts is a document, such as a name. */
export function writesLines(run) {
  return run.tokens_are_lines ?? (run.options.dataset || "").startsWith("names");
}
