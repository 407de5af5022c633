"""Rung 6 of the ladder: four blocks in place of one.

    python train.py config/ladder/6_blocks.py

The same again, three times more.
Validation loss 1.711, mean of three seeds; two and a half minutes on one CPU core (docs/records.md).
"""

out_dir = "out/ladder/6_blocks"
dataset = "shakespeare_char"

n_layer = 4  # new here
n_head = 4
n_embd = 64
block_size = 64
position = "learned"
mlp_ratio = 4.0
residual = True
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
