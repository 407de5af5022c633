"""Rung 2 of the ladder: one head of causal self-attention.

    python train.py config/ladder/2_attention.py

Each character attends to itself and to the characters before it. The head's output replaces its input.

Measured: 20 s (1 CPU core, fp32, n = 3), validation loss 2.350 (n = 3).
"""

base = "1_positions.py"  # its options hold, but for these
out_dir = "out/ladder/2_attention"
n_layer = 1
