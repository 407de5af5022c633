"""Rung 3 of the ladder: four heads in place of one.

    python train.py config/ladder/3_multihead.py

The same width, cut into four heads that look at different places.
Validation loss 2.154, mean of three seeds; 25 s on one CPU core (docs/records.md).
"""

out_dir = "out/ladder/3_multihead"
dataset = "shakespeare_char"

n_layer = 1
n_head = 4  # new here
n_embd = 64
block_size = 64
position = "learned"
mlp_ratio = 0.0
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
