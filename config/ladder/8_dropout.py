"""Rung 8 of the ladder: dropout: the whole GPT, at its small size.

    python train.py config/ladder/8_dropout.py

A tenth of the activations is left out at random, against learning by heart.
config/shakespeare_char.py is the same architecture at its full size.
Validation loss DROP, mean of three seeds; three minutes on one CPU core (docs/records.md).
"""

out_dir = "out/ladder/8_dropout"
dataset = "shakespeare_char"

n_layer = 4
n_head = 4
n_embd = 64
block_size = 64
position = "learned"
mlp_ratio = 4.0
residual = True
norm = "layernorm"
tie_weights = False
init_std = 0.1
dropout = 0.1  # new here

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
