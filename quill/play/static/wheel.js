/** The wheel: a part for each token, as wide as its probability. The number n points at one of them. */

import { colour, mix, prepare } from "./canvas.js";
import { $, calm, fixed } from "./dom.js";
import { choose } from "./sampling.js";

const SPIN = 700; // milliseconds
let tokens = [];
let probs = [];
let turned = null; // called with the index of the token that n points at

/** Wire the wheel; `listener` hears about each new choice. */
export function start(listener) {
  turned = listener;
  $("n").oninput = draw;
  const point = (event) => {
    if (event.type === "pointermove" && !event.buttons) return;
    const { clientWidth } = $("wheel");
    const angle = Math.atan2(event.offsetX - clientWidth / 2, clientWidth / 2 - event.offsetY) / (2 * Math.PI);
    $("n").value = (angle + 1) % 1;
    draw();
  };
  $("wheel").onpointerdown = point;
  $("wheel").onpointermove = point;
}

/** Show these tokens with these probabilities, the likeliest first. */
export function show(names, probabilities) {
  [tokens, probs] = [names, probabilities];
  draw();
}

/** The index of the token that n points at. */
export const chosen = () => choose(probs, Number($("n").value));

/** Draw a new random number, and turn the pointer to it. Resolves when it stands still. */
export async function spin() {
  const target = Math.random();
  const from = Number($("n").value);
  const began = performance.now();
  while (!calm()) {
    const share = Math.min(1, (performance.now() - began) / SPIN);
    const eased = 1 - (1 - share) ** 3;
    $("n").value = (from + (target + 2 - from) * eased) % 1;
    draw();
    if (share === 1) break;
    await new Promise(requestAnimationFrame);
  }
  $("n").value = target;
  draw();
}

function draw() {
  if (!tokens.length) return;
  const size = Math.min($("wheel").parentElement.clientWidth, 200);
  const context = prepare($("wheel"), size, size);
  const [centre, radius, n, i] = [size / 2, size / 2 - 14, Number($("n").value), chosen()];
  const at = (share) => (share - 0.25) * 2 * Math.PI;
  const point = (share, r) => [centre + r * Math.cos(at(share)), centre + r * Math.sin(at(share))];
  let sum = 0;
  let before = 0; // the running sum up to the chosen token
  probs.forEach((p, k) => {
    if (k === i) before = sum;
    if (!p) return;
    context.beginPath();
    context.moveTo(centre, centre);
    context.arc(centre, centre, radius, at(sum), at(sum + p));
    context.fillStyle =
      k === i ? colour("orange") : mix(colour("heat-blue"), colour("paper"), 0.25 + (0.6 * (k % 4)) / 3);
    context.fill();
    if (p > 0.035) {
      context.fillStyle = k === i ? colour("on-orange") : colour("ink");
      context.fillText(short(tokens[k]), ...point(sum + p / 2, radius * 0.76));
    }
    sum += p;
  });
  drawPointer(context, point, n, radius);
  $("n-value").textContent = n.toFixed(3);
  $("drawn").textContent = `n = ${n.toFixed(3)} → ${tokens[i]}`;
  $("part").textContent = `its part: ${before.toFixed(3)} to ${(before + probs[i]).toFixed(3)}`;
  $("wheel").setAttribute(
    "aria-label",
    `Wheel of ${tokens.length} tokens; n = ${fixed(n)} falls into the part of ${tokens[i]}`,
  );
  turned(i);
}

const short = (name) => (name.length > 5 ? `${name.slice(0, 4)}…` : name);

/** A small triangle at the rim. */
function drawPointer(context, point, n, radius) {
  context.beginPath();
  context.moveTo(...point(n, radius - 8));
  context.lineTo(...point(n - 0.02, radius + 12));
  context.lineTo(...point(n + 0.02, radius + 12));
  context.fillStyle = colour("ink");
  context.fill();
}
