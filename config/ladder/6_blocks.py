"""Rung 6 of the ladder: four blocks instead of one.

    python train.py config/ladder/6_blocks.py

A block is attention and MLP. The output of each block is the input of the next.

Measured: 151 s (1 CPU core, fp32, n = 3), validation loss 1.711 (n = 3).
"""

base = "5_residual.py"  # its options hold, but for these
out_dir = "out/ladder/6_blocks"
n_layer = 4
