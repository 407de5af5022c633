"""Rung 7 of the ladder: LayerNorm before each attention, each MLP and the output layer.

    python train.py config/ladder/7_layernorm.py

LayerNorm scales every vector to mean 0 and variance 1, then multiplies each element by a learned weight.

Measured: 113 s (2 CPU cores, fp32, n = 1), validation loss 1.644 (n = 3).
"""

base = "6_blocks.py"  # its options hold, but for these
out_dir = "out/ladder/7_layernorm"
norm = "layernorm"
