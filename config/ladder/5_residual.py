"""Rung 5 of the ladder: residual connections.

    python train.py config/ladder/5_residual.py

Attention and MLP add their output to their input instead of replacing it.

Measured: 46 s (1 CPU core, fp32, n = 3), validation loss 1.929 (n = 3).
"""

base = "4_mlp.py"  # its options hold, but for these
out_dir = "out/ladder/5_residual"
residual = True
