/** Panel "How wrong is it?": the training curve, the validation points, the counted models, and a pinned run. */

import { colour } from "./canvas.js";
import { $, el, fill, fixed, minus } from "./dom.js";
import { on, view } from "./store.js";

const NAMES = { die: "guessing", unigram: "counting tokens", bigram: "counting pairs", own: "this model" };
const MEASURES = { loss: "loss", gradient_norm: "gradient norm", lr: "learning rate" };
const HEIGHT = 270;
const FEW = 30; // steps: fewer are shown as points, for a line of one step has no length
const WHOLE = Array.from({ length: 30 }, (_, i) => [1, 2, 5][i % 3] * 10 ** Math.floor(i / 3)); // between two ticks
const LABEL = 14; // pixels between two labels, at least
let plot = null;

/** Wire the panel. */
export function start() {
  fill($("measure"), Object.entries(MEASURES));
  $("measure").onchange = rebuild;
  on("run pinned", draw);
  on("step", () => plot?.redraw(false));
  on("theme", rebuild);
  on("run", () => {
    if ($("log").textContent === (view.run.log || "")) return;
    const follows = $("log").scrollTop + $("log").clientHeight >= $("log").scrollHeight - 20;
    $("log").textContent = view.run.log || "";
    if (follows) $("log").scrollTop = $("log").scrollHeight;
  });
  new ResizeObserver(() => plot?.setSize({ width: $("curve").clientWidth, height: HEIGHT })).observe($("curve"));
}

/** The mean of each point and its neighbours: a batch of one name jumps, its mean shows the way. */
function smooth(losses) {
  const reach = Math.floor(losses.length / 50);
  if (!reach) return losses;
  const sums = [0];
  for (const loss of losses) sums.push(sums.at(-1) + loss);
  return losses.map((_, i) => {
    const [from, to] = [Math.max(0, i - reach), Math.min(losses.length, i + reach + 1)];
    return (sums[to] - sums[from]) / (to - from);
  });
}

/** What the y axis shows, by its name in the run object. */
const measure = () => $("measure").value;

/** The lines across the picture, if it shows the loss: the models that only count, and a model without a curve. */
function baselines() {
  if (measure() !== "loss" || !view.run) return [];
  const { baselines: counted, evaluations, val_loss: own } = view.run;
  return Object.entries({ ...counted, ...(own && !evaluations.length ? { own } : {}) });
}

/** Curves of both runs on one axis of steps. → uPlot's columns */
function columns() {
  const curves = [view.run, view.pinned].flatMap((run) => {
    if (!run) return [new Map(), new Map(), new Map()];
    const values = run.curve[measure()];
    const evaluations = measure() === "loss" ? run.evaluations : [];
    return [
      new Map(values.map((value, i) => [run.curve.step[i], value])),
      new Map(smooth(values).map((value, i) => [run.curve.step[i], value])),
      new Map(evaluations.map((one) => [one.step, one.val_loss])),
    ];
  });
  const steps = [...new Set(curves.flatMap((curve) => [...curve.keys()]))].sort((a, b) => a - b);
  return [steps, ...curves.map((curve) => steps.map((step) => curve.get(step)))];
}

/** The range of the y axis: all curves and the lines of the counted models. */
function range(_, low, high) {
  const lines = baselines().map(([, loss]) => loss);
  const [from, to] = [Math.min(low ?? lines[0] ?? 0, ...lines), Math.max(high ?? 0, ...lines)];
  return [from - 0.06 * (to - from || 1), to + 0.06 * (to - from || 1)];
}

const reach = (_, low, high) => [
  Math.min(low ?? 0, 0),
  Math.max(high ?? 0, view.run?.curve.step.length ? 10 : (view.run?.max_iters ?? 10)),
];

/** A new plot, with the theme's colours. */
function rebuild() {
  if (!view.run) return;
  plot?.destroy();
  const line = (stroke, width, dash) => ({ stroke, width, dash, spanGaps: true, points: { show: false } });
  const mean = (stroke) => ({
    ...line(stroke, 2),
    points: { show: (u) => u.data[0].length < FEW, size: 8, fill: stroke },
  });
  const faint = (name) => ({ ...line(colour(name), 1), auto: false }); // single batches may leave the picture
  const dots = (stroke) => ({ stroke, width: 2, spanGaps: true, points: { show: true, size: 8, fill: stroke } });
  const axis = {
    stroke: colour("muted"),
    grid: { stroke: colour("line"), width: 1 },
    ticks: { stroke: colour("line") },
    font: "12px system-ui",
  };
  plot = new uPlot(
    {
      width: $("curve").clientWidth || 300,
      height: HEIGHT,
      legend: { show: false },
      cursor: { drag: { x: false, y: false } },
      scales: { x: { time: false, range: reach }, y: { range } },
      axes: [
        { ...axis, label: "step", labelSize: 18, labelGap: 0, labelFont: "12px system-ui", size: 32, incrs: WHOLE },
        { ...axis, size: 44 },
      ],
      series: [
        {},
        faint("faint-blue"),
        mean(colour("blue")),
        dots(colour("ink")),
        faint("faint-orange"),
        mean(colour("orange")),
        { ...dots(colour("orange")), dash: [6, 4] },
      ],
      hooks: { draw: [drawLines], setCursor: [readOut] },
    },
    columns(),
    $("curve"),
  );
}

/** What is said below the curve when the pointer is elsewhere. */
function advice() {
  const [mine, theirs] = [view.run, view.pinned].map((run) => run?.options.dataset);
  if (view.pinned && mine !== theirs)
    return `${view.run.name} has other data (${mine}) than ${view.pinned.name} (${theirs}): their losses can't be compared.`;
  if (view.run.curve.step.length) return "Move the pointer over the curve to read its numbers.";
  return baselines().length
    ? "Dotted: guessing among all tokens alike, and counting how often tokens and pairs of tokens occur."
    : "";
}

/** Say the numbers under the pointer. */
function readOut(u) {
  const i = u.cursor.idx;
  const names = ["batch", "mean", "validation", "batch beside", "mean beside", "validation beside"];
  const values = i === null || i === undefined ? [] : u.data.slice(1).map((column) => column[i]);
  const parts = values.flatMap((value, k) =>
    value === undefined || value === null ? [] : `${names[k]} ${minus(value.toPrecision(4))}`,
  );
  $("curve-key").textContent = parts.length ? `Step ${u.data[0][i]}: ${parts.join(", ")}` : advice();
}

/** Horizontal lines with names for the models that only count, and a vertical one at the chosen step. */
function drawLines(u) {
  const { ctx, bbox } = u;
  const ratio = devicePixelRatio || 1;
  ctx.save();
  ctx.font = `${12 * ratio}px system-ui`;
  ctx.strokeStyle = ctx.fillStyle = colour("muted");
  ctx.lineWidth = ratio;
  ctx.setLineDash([2 * ratio, 4 * ratio]);
  ctx.textAlign = "right";
  let above = -Infinity; // the label before
  for (const [name, loss] of baselines().sort((a, b) => b[1] - a[1])) {
    const y = u.valToPos(loss, "y", true);
    stroke(ctx, bbox.left, y, bbox.left + bbox.width, y);
    above = Math.max(y - 5 * ratio, above + LABEL * ratio);
    write(ctx, `${NAMES[name] ?? name} ${fixed(loss, 2)}`, bbox.left + bbox.width - 6 * ratio, above);
  }
  if (view.step !== null) {
    const x = u.valToPos(view.step, "x", true);
    ctx.strokeStyle = colour("ink");
    stroke(ctx, x, bbox.top, x, bbox.top + bbox.height);
  }
  ctx.restore();
}

/** Text with a border of paper, so that a curve that crosses it leaves it readable. */
function write(context, text, x, y) {
  context.save();
  context.setLineDash([]);
  context.lineWidth = 5 * devicePixelRatio;
  context.strokeStyle = colour("paper");
  context.strokeText(text, x, y);
  context.fillText(text, x, y);
  context.restore();
}

function stroke(context, ...[x, y, toX, toY]) {
  context.beginPath();
  context.moveTo(x, y);
  context.lineTo(toX, toY);
  context.stroke();
}

/** Show the curves of the run, and say their last numbers in words. */
export function draw() {
  if (!view.run) return;
  if (plot) plot.setData(columns());
  else rebuild();
  const { curve, evaluations } = view.run;
  const entry = (name, text, value) =>
    el("li", {}, el("span", { className: `swatch ${name}` }), text, " ", el("b", { textContent: value }));
  const items = [];
  if (curve.loss.length) items.push(entry("train", "training", fixed(smooth(curve.loss).at(-1), 2)));
  if (evaluations.length) items.push(entry("val", "validation", fixed(evaluations.at(-1).val_loss)));
  if (view.pinned)
    items.push(
      entry("pinned", view.pinned.name, fixed(view.pinned.evaluations.at(-1)?.val_loss ?? view.pinned.val_loss)),
    );
  if (!items.length && view.run.val_loss)
    items.push(el("li", { textContent: `This model: ${fixed(view.run.val_loss)}. Press Train for a curve.` }));
  if (!items.length) items.push(el("li", { textContent: "No curve yet." }));
  $("legend").replaceChildren(...items);
  const lines = baselines().map(([name, loss]) => `${NAMES[name] ?? name} ${fixed(loss, 2)}`);
  $("curve").setAttribute("aria-label", `Loss at each step. ${[$("legend").textContent, ...lines].join("; ")}`);
  $("curve").dataset.points = curve.step.length;
  if (plot.cursor.idx === null || plot.cursor.idx === undefined) $("curve-key").textContent = advice();
}

/** Offer every other run for comparison. */
export function offer(runs) {
  const others = runs.filter(({ name }) => name !== view.run?.name).map(({ name }) => [name, name]);
  fill($("pinned"), [["", "nothing"], ...others], view.pinned?.name ?? "");
}
