"""Rung 3 of the ladder: four heads instead of one.

    python train.py config/ladder/3_multihead.py

The width stays the same. Each head has a quarter of it and its own attention weights.

Measured: 25 s (1 CPU core, fp32, n = 3), validation loss 2.154 (n = 3).
"""

base = "2_attention.py"  # its options hold, but for these
out_dir = "out/ladder/3_multihead"
n_head = 4
