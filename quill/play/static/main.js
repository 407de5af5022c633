/** Starts the page: asks what there is, shows a run, and keeps every panel at the newest step or at the chosen one. */

import { ask, gently, oneAtATime, query } from "./api.js";
import * as controls from "./controls.js";
import { $, complain } from "./dom.js";
import * as explain from "./explain.js";
import * as lessons from "./lessons.js";
import * as loss from "./loss.js";
import * as network from "./network.js";
import * as newrun from "./newrun.js";
import * as samples from "./samples.js";
import { change, on, ready, view, writesLines } from "./store.js";
import { listen } from "./stream.js";
import * as table from "./table.js";
import * as timeline from "./timeline.js";
import * as token from "./token.js";
import * as weights from "./weights.js";

const PANELS = { token, samples, table, weights, network }; // those that ask for numbers of the weights
const inView = new Set();
const stale = new Set(); // panels out of view whose numbers are older than the run

/** Refresh what can be seen; the other panels follow when they are scrolled into view. */
const round = oneAtATime(async () => {
  Object.keys(PANELS).forEach((name) => stale.add(name));
  await Promise.all(
    [...stale]
      .filter((name) => inView.has(name))
      .map((name) => {
        stale.delete(name);
        return PANELS[name].refresh();
      }),
  );
  $("main").dataset.shown = ready(view.run) ? view.run.name : ""; // what the panels in view show now
});

const follow = gently(round); // the automatic rounds of a run that trains

/** Refresh a panel that scrolls into view with older numbers. */
function watchPanels() {
  const observer = new IntersectionObserver(
    (entries) => {
      for (const { target, isIntersecting } of entries) {
        if (isIntersecting) inView.add(target.id);
        else inView.delete(target.id);
        if (isIntersecting && stale.delete(target.id)) PANELS[target.id].refresh();
      }
    },
    { rootMargin: "80px" },
  );
  Object.keys(PANELS).forEach((name) => {
    stale.add(name);
    observer.observe($(name));
  });
}

let opened = 0; // counts the calls of open

/** Show a run, by its name or its run object. */
async function open(which) {
  try {
    const mine = ++opened;
    const run = typeof which === "string" ? await ask(query("/api/run", { name: which })) : which;
    if (mine !== opened) return; // another run was chosen meanwhile
    const other = run.name !== view.run?.name;
    if (other) {
      complain($("error"), "");
      if (view.pinned?.name === run.name) change({ pinned: null });
      remember(run.name);
      change({ lost: null, step: null, layer: 0, head: 0, run });
      chooseTexts(run);
      listen(run.name, arrived);
      round();
    } else {
      arrived(run);
    }
    if (other || !view.runs.some(({ name }) => name === run.name)) change({ runs: await controls.listRuns() });
  } catch (error) {
    complain($("error"), error.message);
  }
}

/** The run in the address, so that reload, back and forward keep it. */
const addressed = () => new URLSearchParams(location.hash.slice(1)).get("run");

function remember(name) {
  if (addressed() === name) return;
  const address = `#run=${encodeURIComponent(name).replaceAll("%2F", "/")}`;
  history[view.run ? "pushState" : "replaceState"](null, "", address);
}

/** A new state of the run that is shown. */
function arrived(run) {
  if (run.name !== view.run?.name) return;
  const before = view.run;
  change({ run });
  if (before.status !== run.status) findRuns();
  const moved =
    run.weights_step !== before.weights_step ||
    run.step !== before.step ||
    run.snapshots.length !== before.snapshots.length;
  if (moved && view.step === null && !document.hidden) follow();
}

/** The first texts of the panels, by the start of the dataset's name. Every vocabulary has the empty text. */
const TEXTS = { names: ["ann", "anna"], shakespeare: ["ROMEO:", "To be, or not to be"], "": ["", ""] };

/** Put the first texts into the panels. A text that somebody typed is kept. */
function chooseTexts(run) {
  const kind = Object.keys(TEXTS).find((start) => (run.options.dataset ?? "").startsWith(start));
  ["text", "score-text"].forEach((id, i) => {
    if (!$(id).dataset.typed) $(id).value = TEXTS[kind][i];
  });
  change({ text: $("text").value });
}

/** Follow a pinned run that trains beside the one that is shown. */
async function followPinned() {
  if (view.pinned?.status !== "running" || document.hidden) return;
  const run = await ask(query("/api/run", { name: view.pinned.name })).catch(() => null);
  if (run && run.name === view.pinned?.name) {
    view.pinned = run; // not by change(): that would ask for all panels at once
    loss.draw();
    follow();
  }
}

/** List the runs that were started elsewhere meanwhile. */
async function findRuns() {
  const runs = document.hidden ? null : await controls.listRuns().catch(() => null);
  if (runs) change({ runs });
}

/** Compare with another run. */
async function pin() {
  const name = $("pinned").value;
  try {
    change({ pinned: name ? await ask(query("/api/run", { name })) : null });
    complain($("loss"), "");
  } catch (error) {
    complain($("loss"), error.message);
  }
}

async function main() {
  for (const panel of [token, samples, table, weights, network, timeline, loss]) panel.start();
  for (const id of ["text", "score-text"]) {
    if (id in sessionStorage) Object.assign($(id), { value: sessionStorage[id] }).dataset.typed = "yes"; // a reload
    $(id).addEventListener("input", () => {
      $(id).dataset.typed = "yes";
      sessionStorage[id] = $(id).value;
    });
  }
  addEventListener("popstate", () => addressed() && open(addressed()));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => change({ theme: performance.now() }));
  document.addEventListener("visibilitychange", () => !document.hidden && view.run && round());
  addEventListener("resize", () => change({ theme: performance.now() }));
  $("text").onkeydown = (event) => {
    if (event.key === "Enter" && writesLines(view.run)) event.preventDefault(); // a name has no second line
  };
  setInterval(followPinned, 2000);
  setInterval(findRuns, 5000);
  on("lost", findRuns);
  on("step pinned", round);
  on("runs run", () => loss.offer(view.runs));
  $("pinned").onchange = pin;
  try {
    const [setup, runs] = await Promise.all([ask("/api/setup"), controls.listRuns()]);
    change({ setup, runs });
    controls.start(open);
    newrun.start(setup, open);
    lessons.start(setup, open);
    explain.start(setup.code);
    const known = runs.some(({ name }) => name === addressed());
    await open(known ? addressed() : setup.selected || runs[0].name);
    watchPanels();
  } catch (error) {
    $("status").textContent = error.message;
    complain($("error"), error.message);
  }
}

main();
