"""Rung 4 of the ladder: an MLP after attention.

    python train.py config/ladder/4_mlp.py

The MLP is applied to each position separately.

Measured: 43 s (1 CPU core, fp32, n = 3), validation loss 2.006 (n = 3).
"""

out_dir = "out/ladder/4_mlp"
dataset = "shakespeare_char"

n_layer = 1
n_head = 4
n_embd = 64
block_size = 64
position = "learned"
mlp_ratio = 4.0  # new here
residual = False
norm = "none"
tie_weights = False
init_std = 0.1
dropout = 0.0

batch_size = 32
gradient_accumulation_steps = 1
max_iters = 2000
learning_rate = 5e-3
min_lr = 5e-4
warmup_iters = 50
beta2 = 0.99

eval_interval = 500
log_interval = 100
final_samples = 1
