"""Tiny Shakespeare by characters on a laptop's CPU: nanoGPT's laptop recipe, 0.8M parameters.

    python train.py config/shakespeare_char_cpu.py

A minute on two CPU cores with bf16 (59 s, docs/records.md), to a validation loss of 1.84. The learning rate is twice
nanoGPT's; at its 1e-3 the loss is 1.91.
"""

out_dir = "out/shakespeare_char_cpu"
dataset = "shakespeare_char"

n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
dropout = 0.0

batch_size = 12
gradient_accumulation_steps = 1
max_iters = 2000
learning_rate = 2e-3
min_lr = 1e-4
warmup_iters = 100
beta2 = 0.99

eval_interval = 500
log_interval = 10
