"""Tiny Shakespeare by characters in the time of nanoGPT's laptop recipe, to a much lower loss: 0.6M parameters.

    python train.py config/shakespeare_char_fast.py

RoPE, QK-norm, ReLU² and Muon for as long as nanoGPT's laptop recipe takes to 1.898: two minutes on two CPU cores
without bf16, to a validation loss of 1.594 (mean of 3 seeds; docs/records.md).
"""

out_dir = "out/shakespeare_char_fast"
dataset = "shakespeare_char"

n_layer = 3
n_head = 4
n_embd = 128
block_size = 64
dropout = 0.0
position = "rope"
activation = "relu2"
qk_norm = True

batch_size = 32
gradient_accumulation_steps = 1
max_iters = 870
optimizer = "muon"
learning_rate = 1e-2
muon_learning_rate = 0.015
weight_decay = 0.0
schedule = "linear"
warmup_iters = 10
min_lr = 2e-4

eval_interval = 870
log_interval = 20
