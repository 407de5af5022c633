/** Elements, texts and numbers. Every text goes through textContent, so nothing that a run holds can become markup. */

/** Return the element with this id. */
export const $ = (id) => document.getElementById(id);

/** Make an element: properties and aria-… or data-… attributes, then its children (nodes or texts). */
export function el(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined) continue;
    if (name in node) node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

/** Fill a <select> with [value, text] pairs and keep what was chosen, if it is still there. */
export function fill(select, pairs, chosen = select.value) {
  const options = pairs.map(([value, text]) => el("option", { value, textContent: text }));
  const same =
    options.length === select.options.length &&
    options.every((o, i) => o.value === select.options[i].value && o.textContent === select.options[i].textContent);
  if (!same) select.replaceChildren(...options); // an open list would close at every event otherwise
  if (pairs.some(([value]) => String(value) === String(chosen))) select.value = chosen;
}

/** Show that the model cannot read a text: which characters it has no token for, and which ones it has. `tokens`: some. */
export function complainOfText(where, message, tokens = []) {
  const [, unknown] = message.match(/^(.*) \(\d+ characters? that (?:is|are) not in the vocabulary\)$/s) ?? [];
  if (!unknown) return complain(where, message);
  const letters = tokens.filter((token) => [...token].length === 1).sort();
  const known = letters.join("") === "abcdefghijklmnopqrstuvwxyz" ? "a–z: type small letters" : letters.join(" ");
  const marked = unknown.replace(/(["'])(.*?)\1(?=, |$)/g, "“$2”").replace(/, (?=[^,]*$)/, " or ");
  return complain(where, `The model has no token for ${marked}.${known ? ` It knows ${known}.` : ""}`);
}

/** Show an error near its cause, or hide it: `where` is the panel's element, whose first .message is used. */
export function complain(where, text) {
  const line = where.classList.contains("message") ? where : where.querySelector(".message");
  line.textContent = text || "";
  line.hidden = !text;
}

/** Say something to screen readers. Only what changed: a number that moves twice a second would drown them. */
export function announce(text) {
  if ($("announce").textContent !== text) $("announce").textContent = text;
}

/** A line that a script prints, in the words of the page: options without dashes, no advice for a terminal. */
export const reword = (line) =>
  line
    .replace(/^train\.py: /, "")
    .replace(/^https?:\S+: (\[[^\]]*\] )?([^;]*);.*/, "the data could not be downloaded ($2)")
    .replace(/^the text is longer than (.*)$/, "The text is too long: at most $1.")
    .replace(/--(\w+)/g, "$1");

/** A number with thousands separated: 4192 → "4,192". */
export const count = (number) => Number(number).toLocaleString("en-US");

/** A number with `digits` decimals, as `sample.py --score` prints it. */
export const fixed = (number, digits = 3) => minus(number?.toFixed(digits) ?? "–");

/** A number's text with the sign that −ln p has, and without one if it is 0. */
export const minus = (text) => text.replace(/^-(?=[0.]*$)/, "").replace("-", "−");

/** How a token is shown → the characters that it stands for. */
export function plain(token) {
  return token.replaceAll("␣", " ").replaceAll("\\n", "\n").replaceAll("\\t", "\t").replaceAll("\\\\", "\\");
}

/** Whether the reader asked for little motion. */
export const calm = () => matchMedia("(prefers-reduced-motion: reduce)").matches;
