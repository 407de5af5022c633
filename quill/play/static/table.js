/** Panel "How surprised is it?": each position of a text, what the model expected there, and −ln p of what came. */

import { ask, oneAtATime } from "./api.js";
import { mix, readPalette } from "./canvas.js";
import { $, announce, complain, complainOfText, el, fixed } from "./dom.js";
import { knownTokens, momentOf, on, ready, view } from "./store.js";

const ROWS = 200; // of the table, at most: a long text would stop the browser
const COLUMNS = 30; // tokens in the head of the table, at most
let answer = null; // of /api/score
let other = null; // … for the pinned run

/** Wire the panel. */
export function start() {
  $("score-text").oninput = () => refresh().then(() => announce($("mean").textContent));
  on("theme", () => answer && draw());
}

const question = (run) =>
  ask("/api/score", { name: run.name, step: momentOf(run, view.step), text: $("score-text").value });

/** Load the score of the text. */
export const refresh = oneAtATime(async () => {
  if (!view.run || !ready(view.run)) return;
  if (!$("score-text").value) {
    answer = null;
    complain($("table"), "");
    $("scores").replaceChildren();
    $("mean").textContent = "Type a name above: each letter gets a number.";
    return;
  }
  try {
    const [run, pinned] = [view.run, view.pinned]; // they may change before the answers come
    answer = { ...(await question(run)), sides: run.vocab_size };
    other =
      pinned &&
      (await question(pinned).then(
        (one) => ({ ...one, name: pinned.name }),
        () => null,
      ));
    complain($("table"), "");
    draw();
  } catch (error) {
    complainOfText($("table"), error.message, knownTokens());
  }
}, "table");

/** The tokens in the head: those of the text, and the likeliest anywhere, in alphabetical order. */
function columns(rows) {
  const best = new Map();
  const put = (token, p) => best.set(token, Math.max(best.get(token) ?? 0, p));
  for (const row of rows) {
    put(row.token, 1);
    for (const { token, probability } of row.likeliest) put(token, probability);
  }
  const kept = [...best]
    .sort((a, b) => b[1] - a[1])
    .slice(0, COLUMNS)
    .map(([token]) => token);
  return kept.sort((a, b) => a.startsWith("<") - b.startsWith("<") || (a < b ? -1 : 1));
}

/** How surprised somebody is at a loss that is `share` of the loss of a guess among all tokens. */
function verdict(mean, vocabulary) {
  const share = mean / Math.log(vocabulary);
  if (share < 0.5) return "It expected that.";
  if (share < 0.75) return "A little surprised.";
  return share < 1 ? "Surprised!" : "Very surprised: guessing would have been better!";
}

function draw() {
  const rows = answer.rows.slice(0, ROWS);
  const names = columns(rows);
  const palette = readPalette();
  $("mean").replaceChildren(
    el("b", { textContent: verdict(answer.mean_loss, answer.sides) }),
    ` Mean −ln p: `,
    el("b", { id: "mean-loss", textContent: fixed(answer.mean_loss, 4) }),
    ` over ${answer.tokens} tokens; guessing among ${answer.sides} tokens: ${fixed(Math.log(answer.sides), 3)}.`,
    answer.tokens > ROWS ? ` The first ${ROWS} are shown.` : "",
    other ? el("span", { className: "orange", textContent: ` ${other.name}: ${fixed(other.mean_loss, 4)}` }) : "",
  );
  const tops = ["context", "token", "p", "−ln p", ...names];
  const head = el(
    "tr",
    {},
    ...tops.map((text, i) =>
      el("th", { scope: "col", textContent: text, className: i > 3 ? "of-token" : ["context", "", "", "surprise"][i] }),
    ),
  );
  $("scores").replaceChildren(
    el("table", {}, el("thead", {}, head), el("tbody", {}, ...rows.map((row) => line(row, names, palette)))),
  );
}

/** A row: the context, the token, its probability, its surprise as a bar, and the probability of each token. */
function line(row, names, palette) {
  const expected = new Map(row.likeliest.map(({ token, probability }) => [token, probability]));
  expected.set(row.token, row.probability);
  const surprise = el("td", { className: "surprise", textContent: fixed(row.loss) });
  surprise.style.setProperty("--s", Math.min(1, row.loss / 6));
  const cells = names.map((name) => {
    const p = expected.get(name);
    const cell = el("td", {
      className: name === row.token ? "p target" : "p",
      title: p === undefined ? name : `p(${name}) = ${fixed(p, 4)}`,
    });
    if (p !== undefined) {
      cell.style.setProperty("background-color", mix(palette.paper, palette.blue, Math.sqrt(p)));
      cell.append(el("span", { className: "hidden", textContent: fixed(p, 3) }));
    }
    return cell;
  });
  const p = row.probability < 5e-5 ? row.probability.toExponential(0) : fixed(row.probability, 4);
  return el(
    "tr",
    {},
    el("th", { scope: "row", className: "context", textContent: row.context }),
    el("td", { className: "came", textContent: row.token }),
    el("td", { textContent: p }),
    surprise,
    ...cells,
  );
}
