"""Rung 0 of the ladder: a bigram model. It predicts the next character from the last one alone.

    python train.py config/ladder/0_bigram.py

A table has a vector for each character. A linear layer turns the vector into the logits of the next character.

Measured: 7 s (1 CPU core, fp32, n = 3), validation loss 2.483 (n = 3).
"""

out_dir = "out/ladder/0_bigram"
dataset = "shakespeare_char"

n_layer = 0
n_head = 1
n_embd = 64
block_size = 64
position = "none"
mlp_ratio = 0.0
residual = False
norm = "none"
tie_weights = False
init_std = 0.1

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
