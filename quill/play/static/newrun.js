/** The form for a new run: a config or a run to start from, data or a pasted text, dials; and its export as a config. */

import { ask, query } from "./api.js";
import { $, complain, el, fill, reword } from "./dom.js";
import { on, view } from "./store.js";

const PASTE = "paste a text …";
const OFFLINE = "names"; // bundled, so the first run needs no network
const EVALUATIONS = 10; // of a run, at least: an evaluation changes no weight, and its loss is a point of the curve
const MOST = { n_layer: 100, n_head: 128, n_embd: 16384, block_size: 65536, batch_size: 65536 }; // typing errors
let base = {}; // the options that the form starts from

/** Open or close a folded panel, and say so on its button. */
export function fold(id, open = $(id).hidden) {
  $(id).hidden = !open;
  $(`open-${id}`).ariaExpanded = String(open);
}

/** Build the form from /api/setup; `show` opens the run that it starts. */
export function start(setup, show) {
  for (const id of ["new", "lessons"]) $(`open-${id}`).onclick = () => fold(id);
  $("config").onchange = take;
  $("dataset").onchange = () => {
    $("pasted").hidden = $("dataset").value !== PASTE;
  };
  $("dials").replaceChildren(...setup.dials.map(dial));
  $("form").onsubmit = async (event) => {
    event.preventDefault();
    complain($("form-error"), "");
    $("start").disabled = true; // two clicks are one run
    $("status").textContent = "Starting a new run …";
    try {
      await show(await ask("/api/start", { ...request(), paused: false }));
      fold("new", false);
      scrollTo({ top: 0 });
    } catch (error) {
      complain($("form-error"), error.message);
      $("status").textContent = "Nothing was started.";
    }
    $("start").disabled = false;
  };
  $("export").onclick = exportConfig;
  fill(
    $("dataset"),
    [...setup.datasets, PASTE].map((name) => [name, name]),
  );
  let name = null;
  on("run", () => {
    if (view.run.name === name) return; // only another run, not a new step of this one
    name = view.run.name;
    offer(setup);
  });
}

/** What a run like the one that is shown starts from: this run, or a config if it is the bundled model. */
function origin() {
  const { run, setup } = view;
  return run && run.status !== "bundled" ? `run:${run.name}` : (setup.selected_config ?? "config/microgpt.py");
}

/** Offer the run that is shown, then every config. */
function offer(setup) {
  const run = view.run && view.run.status !== "bundled" ? [[`run:${view.run.name}`, `like ${view.run.name}`]] : [];
  const configs = setup.configs.map(({ name, title }) => [
    name,
    `${name.replace("config/", "").replace(".py", "")}: ${title}`,
  ]);
  fill($("config"), [...run, ...configs]);
  $("config").value = origin();
  take();
}

/** A number, a choice or a switch for one option. */
function dial({ name, help: line, kind, choices }) {
  const help = reword(line);
  const id = `dial-${name}`;
  const list = kind === "bool" ? ["True", "False"] : choices;
  const input = list
    ? el("select", { id, title: help }, ...list.map((value) => el("option", { value, textContent: value })))
    : el("input", { id, type: "number", step: kind === "int" ? 1 : "any", max: MOST[name], title: help });
  return el(
    "label",
    { className: "field" },
    el("span", { textContent: name }),
    input,
    el("small", { textContent: help }),
  );
}

/** A config's docstring without its title, which the list has, and without its command. */
function describe({ about }) {
  const paragraphs = about
    .split(/\n\s*\n/)
    .slice(1)
    .filter((text) => !text.trim().startsWith("python "));
  return reword(paragraphs.map((text) => text.replace(/\s*\n\s*/g, " ")).join(" "));
}

/** Put the options of the chosen config or run into the form. */
function take() {
  const { setup, run } = view;
  const value = $("config").value;
  const config = setup.configs.find(({ name }) => name === value);
  base = config ? config.options : (run?.options ?? {});
  $("about").textContent = config ? describe(config) : "The same options as this run, from new weights.";
  for (const { name } of setup.dials) $(`dial-${name}`).value = base[name] ?? "";
  const dataset = value === "config/microgpt.py" && setup.datasets.includes(OFFLINE) ? OFFLINE : base.dataset;
  if (dataset && ![...$("dataset").options].some((option) => option.value === dataset))
    $("dataset").prepend(el("option", { value: dataset, textContent: dataset }));
  $("dataset").value = dataset;
  $("dataset").onchange();
  $("export").disabled = !run;
}

/** A dial's value as JSON, by its kind. */
function valueOf({ name, kind }) {
  const text = $(`dial-${name}`).value;
  if (text === "") return null;
  if (kind === "bool") return text === "True";
  return kind === "int" || kind === "float" ? Number(text) : text;
}

/** What /api/start takes: only the options that differ from those of the config or of the run. */
export function request() {
  const value = $("config").value;
  const options = {};
  for (const one of view.setup.dials) {
    const now = valueOf(one);
    if (now !== null && String(now) !== String(base[one.name])) options[one.name] = now;
  }
  const pasted = $("dataset").value === PASTE;
  if (!pasted && $("dataset").value && $("dataset").value !== base.dataset) options.dataset = $("dataset").value;
  const steps = options.max_iters ?? base.max_iters;
  if (base.eval_interval > steps / EVALUATIONS) options.eval_interval = Math.max(1, Math.floor(steps / EVALUATIONS));
  const from = value.startsWith("run:") ? { config: null, run: value.slice(4) } : { config: value, run: null };
  const text = pasted ? $("text-of-run").value : null;
  return { ...from, options, text, documents: pasted && $("lines").checked ? "lines" : "none" };
}

/** What /api/start takes for a run like the one that is shown. The form counts if it is open and starts from this run. */
export function likeShown() {
  if ($("new").hidden || $("config").value !== origin()) offer(view.setup);
  return request();
}

/** Show the config file that trains the shown run again, whatever the form says. */
async function exportConfig() {
  try {
    $("exported").textContent = await ask(query("/api/config", { name: view.run.name }));
    $("exported").hidden = false;
    complain($("form-error"), "");
  } catch (error) {
    complain($("form-error"), error.message);
  }
}
