"""Rung 6 of the ladder: four blocks instead of one.

    python train.py config/ladder/6_blocks.py

A block is attention and MLP. The output of each block is the input of the next.

Measured: 151 s (1 CPU core, fp32, n = 3), validation loss 1.711 (n = 3).
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
