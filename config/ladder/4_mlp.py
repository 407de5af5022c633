"""Rung 4 of the ladder: an MLP after attention.

    python train.py config/ladder/4_mlp.py

The MLP is applied to each position separately.

Measured: 43 s (1 CPU core, fp32, n = 3), validation loss 2.006 (n = 3).
"""

base = "3_multihead.py"  # its options hold, but for these
out_dir = "out/ladder/4_mlp"
mlp_ratio = 4.0
