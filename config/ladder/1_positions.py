"""Rung 1 of the ladder: the bigram model with position embeddings.

    python train.py config/ladder/1_positions.py

A second table has a vector for each position, which is added to the character's. The position of a character in the
window says little about the next character, so the loss stays the same.

Measured: 6 s (1 CPU core, fp32, n = 3), validation loss 2.483 (n = 3).
"""

out_dir = "out/ladder/1_positions"
dataset = "shakespeare_char"

n_layer = 0
n_head = 1
n_embd = 64
block_size = 64
position = "learned"  # new here
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
