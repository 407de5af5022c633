/** Logits → probabilities → a token, as `probabilities` and `sample_token` in quill/generation.py compute them. */

/** softmax(logits / temperature) of `logits`, the likeliest first, with 0 for what top_k and top_p drop; the sum is 1. */
export function probabilities(logits, temperature, topK, topP) {
  const largest = Math.max(...logits);
  let kept = logits.map((logit) => (logit - largest) / temperature);
  if (topK !== null && topK < kept.length) {
    const smallest = kept[topK - 1];
    kept = kept.map((scaled) => (scaled < smallest ? -Infinity : scaled));
  }
  let probs = normalised(kept.map(Math.exp));
  if (topP !== null && topP < 1) {
    let before = 0; // the sum of the likelier ones
    probs = probs.map((p, i) => {
      const keep = i === 0 || before < topP;
      before += p;
      return keep ? p : 0;
    });
  }
  return normalised(probs);
}

/** Divide by the sum. */
function normalised(numbers) {
  const sum = numbers.reduce((a, b) => a + b, 0);
  return numbers.map((number) => number / sum);
}

/** The index of the part of the wheel that the number `n` (0 to 1) falls into: the first whose running sum is above n. */
export function choose(probs, n) {
  let sum = 0;
  let last = 0;
  for (let i = 0; i < probs.length; i++) {
    sum += probs[i];
    if (probs[i] > 0) last = i;
    if (n < sum) return i;
  }
  return last; // n is above the sum by rounding only
}
