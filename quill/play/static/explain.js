/** For each panel: what to look for, its formula, the code that computes it, and an exercise. */

import { $, el } from "./dom.js";
import { on, view } from "./store.js";

const PANELS = {
  samples: {
    look: "Press Train. Then move the slider above to see earlier steps.",
    formula: "text = token₁ token₂ … , each drawn from p(next | the last block_size tokens)",
    code: ["sample_token", "GPT.forward"],
    exercise: "Move the temperature to 0.1, then to 2. At which end do all samples look alike, and why?",
  },
  token: {
    look: "Move the temperature: the bars change, the logits do not. Then draw.",
    formula: "pᵢ = e^(zᵢ / T) ∕ Σⱼ e^(zⱼ / T)      zᵢ: logit of token i, T: temperature",
    code: ["CausalSelfAttention.attend", "probabilities"],
    exercise: "Type your name letter by letter. At which letter is the longest bar wrong?",
  },
  loss: {
    look: "The curve should fall below guessing among all tokens alike, then below the models that only count.",
    formula: "loss = −(1/N) Σ ln p(right token)      guessing among V tokens: ln V",
    code: ["GPT.forward", "train_step"],
    exercise: "Train with a rate ten times larger, and compare the two curves. What happens with a hundred times?",
  },
  network: {
    look: "Click a part to see its numbers.",
    formula: "", // of the model that is shown: formulaOf
    code: ["Block.forward", "MLP.forward", "GPT.final_hidden"],
    exercise: "Double the width n_embd. Which parts get twice as many parameters, and which four times?",
  },
  table: {
    look: "Long bars are surprises. The framed cell of a row is the token that really came; the more blue a cell, the likelier its token.",
    formula: "surprise = −ln p(token | the tokens before it);   mean = their sum ∕ their number",
    code: ["score"],
    exercise: "Find a name with a mean below 1.5, and one above 4. What do the surprising letters have in common?",
  },
  weights: {
    look: "At the start these are random numbers. Train, and watch them change.",
    formula: "w ← w − rate · (gradient, smoothed and scaled by the optimizer)",
    code: ["GPT.init_weights", "train_step"],
    exercise: "Train, and compare the rows of a, e, i, o, u in wte. Do they become alike?",
  },
};

/** Put the sentence, the formula and the exercise into each panel; `code` is that of /api/setup. */
export function start(code) {
  for (const [panel, { look, formula, code: names, exercise }] of Object.entries(PANELS)) {
    const where = $(panel);
    where.querySelector(".look").textContent = look;
    const sources = names.map((name) => listing(code[name]));
    const details = el(
      "details",
      {},
      el("summary", { textContent: "Formula, code, exercise" }),
      el("p", { className: "formula", textContent: formula }),
      ...sources,
    );
    details.append(el("p", { className: "exercise" }, el("b", { textContent: "Try it. " }), exercise));
    where.querySelector(".explain").replaceChildren(details);
  }
  const formula = $("network").querySelector(".formula");
  const follow = () => (formula.textContent = formulaOf(view.run.options));
  on("run", follow);
  if (view.run) follow();
}

/** What a model with these options computes, step by step: the lessons leave parts out. */
function formulaOf({ n_layer, position, ngram, norm, norm_embedding, norm_final, residual, mlp_ratio }) {
  const normed = (wanted) => (wanted && norm !== "none" ? "norm(x)" : "x");
  const add = residual ? "x + " : "";
  const mlp = mlp_ratio ? `   x ← ${add}MLP(${normed(true)});` : "";
  const added = `${ngram ? " + ngrams[tokens]" : ""}${position === "learned" ? " + wpe[position]" : ""}`;
  const lines = [`x = wte[token]${added}`];
  if (norm_embedding && norm !== "none") lines.push("x ← norm(x)");
  if (n_layer)
    lines.push(`x ← ${add}attention(${normed(true)});${mlp}   in each of ${n_layer} block${n_layer > 1 ? "s" : ""}`);
  return [...lines, `logits = W ${normed(norm_final)}`].join("\n");
}

/** A function's place and its lines. */
function listing({ name, file, line, source }) {
  const pre = el("pre", { tabIndex: 0, "aria-label": `The code of ${name}` }, el("code", { textContent: source }));
  return el("figure", {}, el("figcaption", { textContent: `${file}, line ${line}: ${name}` }), pre);
}
