"""Rung 7 of the ladder: LayerNorm before each attention, each MLP and the output layer.

    python train.py config/ladder/7_layernorm.py

LayerNorm scales every vector to mean 0 and variance 1, then multiplies each element by a learned weight.

Measured: 113 s (2 CPU cores, fp32, n = 1), validation loss 1.644 (n = 3).
"""

out_dir = "out/ladder/7_layernorm"
dataset = "shakespeare_char"

n_layer = 4
n_head = 4
n_embd = 64
block_size = 64
position = "learned"
mlp_ratio = 4.0
residual = True
norm = "layernorm"  # new here
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
