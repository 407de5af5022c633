/** Panel "What it writes": texts of the weights at the chosen step, for the same prompt and the same seed. */

import { ask, oneAtATime } from "./api.js";
import { $, complain, complainOfText, el } from "./dom.js";
import { change, knownTokens, momentOf, on, ready, view, writesLines } from "./store.js";

const LINES = { count: 12, max_new_tokens: 40 }; // short texts, such as names
const PROSE = { count: 1, max_new_tokens: 240 }; // one longer text

/** Wire the panel. */
export function start() {
  $("prompt").oninput = () => change({ prompt: $("prompt").value });
  $("again").onclick = () => change({ seed: Math.floor(Math.random() * 1e6) });
  on("prompt seed", refresh);
  let timer = null; // a slider that is dragged asks once it rests: samples need forward passes
  on("temperature top_k top_p", () => {
    clearTimeout(timer);
    timer = setTimeout(refresh, 300);
  });
}

function question(run) {
  const { prompt, temperature, top_k, top_p, seed } = view;
  const size = writesLines(run) ? LINES : PROSE;
  return ask("/api/samples", {
    name: run.name,
    step: momentOf(run, view.step),
    prompt,
    temperature,
    top_k,
    top_p,
    seed,
    ...size,
  });
}

/** Load the samples of the run, and of the pinned one beside them. */
export const refresh = oneAtATime(async () => {
  if (!view.run || !ready(view.run)) return;
  try {
    const [run, pinned] = [view.run, view.pinned]; // they may change before the answers come
    const mine = await question(run);
    const theirs = pinned && (await question(pinned));
    complain($("samples"), "");
    put($("texts"), mine.texts, run);
    $("pinned-samples").hidden = !theirs;
    $("samples-of").textContent = theirs ? run.name : "";
    if (theirs) {
      put($("pinned-texts"), theirs.texts, pinned);
      $("pinned-of").textContent = pinned.name;
    }
    tellStars(mine.texts);
  } catch (error) {
    complainOfText($("samples"), error.message, knownTokens());
  }
}, "samples");

/** Fill a list with texts. */
function put(list, texts, run) {
  list.classList.toggle("prose", !writesLines(run));
  list.replaceChildren(
    ...texts.map(({ text, is_new }) => {
      const item = el(
        "li",
        { className: is_new ? "made" : "", title: text },
        el("span", { textContent: text || "(nothing)" }),
      );
      if (is_new)
        item.append(
          el("span", { className: "star", textContent: " ★" }),
          el("span", { className: "hidden", textContent: " not in the list" }),
        );
      return item;
    }),
  );
}

/** Say what the stars mean, and for how many texts. */
function tellStars(texts) {
  const known = texts.filter(({ is_new }) => is_new !== null && is_new !== undefined);
  const made = known.filter(({ is_new }) => is_new).length;
  $("star").textContent = known.length ? `★ Not in the data: ${made} of ${known.length}.` : "";
}
