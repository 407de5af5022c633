"""Rung 1 of the ladder: the bigram model with position embeddings.

    python train.py config/ladder/1_positions.py

A second table has a vector for each position, which is added to the character's. The position of a character in the
window says little about the next character, so the loss stays the same.

Measured: 6 s (1 CPU core, fp32, n = 3), validation loss 2.483 (n = 3).
"""

base = "0_bigram.py"  # its options hold, but for these
out_dir = "out/ladder/1_positions"
position = "learned"
