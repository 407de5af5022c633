"""Rung 2 of the ladder: one head of causal self-attention.

    python train.py config/ladder/2_attention.py

Each character attends to itself and to the characters before it. The head's output replaces its input.

Measured: 20 s (1 CPU core, fp32, n = 3), validation loss 2.350 (n = 3).
"""

out_dir = "out/ladder/2_attention"
dataset = "shakespeare_char"

n_layer = 1  # new here
n_head = 1
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
