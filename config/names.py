"""A first run: the bundled list of given names, no network, 20 generated names at the end.

    python train.py config/names.py

Measured: 35 s (2 CPU cores, bf16, n = 1), validation loss 2.337 (n = 1).
"""

out_dir = "out/names"
dataset = "names"

n_layer = 3
n_head = 4
n_embd = 64
block_size = 16
dropout = 0.1

batch_size = 64
gradient_accumulation_steps = 1
max_iters = 1500
learning_rate = 2e-3
min_lr = 2e-4
warmup_iters = 50
beta2 = 0.99

eval_interval = 100
log_interval = 10
final_samples = 20
sample_tokens = 16
