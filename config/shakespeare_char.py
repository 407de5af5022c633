"""Tiny Shakespeare on a GPU: nanoGPT's recipe, 10.7M parameters.

    python train.py config/shakespeare_char.py

The shape and the recipe are those of nanoGPT's config/train_shakespeare_char.py. On two CPU cores this takes hours.

Not measured.
"""

out_dir = "out/shakespeare_char"
dataset = "shakespeare_char"

n_layer = 6
n_head = 6
n_embd = 384
block_size = 256
dropout = 0.2

batch_size = 64
gradient_accumulation_steps = 1
max_iters = 5000
learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 100
beta2 = 0.99

eval_interval = 250
log_interval = 10
