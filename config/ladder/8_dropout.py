"""Rung 8 of the ladder: dropout. All parts of a GPT, at a small size.

    python train.py config/ladder/8_dropout.py

In training, a tenth of the activations is set to zero at random. This reduces overfitting in large models; it raises
the loss of this small one. config/shakespeare_char.py has the same parts at a larger size.

Measured: 170 s (1 CPU core, fp32, n = 3), validation loss 1.781 (n = 3).
"""

base = "7_layernorm.py"  # its options hold, but for these
out_dir = "out/ladder/8_dropout"
dropout = 0.1
