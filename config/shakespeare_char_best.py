"""Tiny Shakespeare: the lowest validation loss that quill has reached so far, 3.2M parameters.

    python train.py config/shakespeare_char_best.py

This is shakespeare_char_laptop.py with 1,700 steps instead of 1,350.

Measured: 393 s (2 CPU cores, bf16, n = 1), validation loss 1.437 (n = 1).
"""

base = "shakespeare_char_laptop.py"  # its options hold, but for these
out_dir = "out/shakespeare_char_best"
max_iters = 1700
eval_interval = 850
