"""Tiny Shakespeare: the fastest run to nanoGPT's laptop loss on a CPU, 0.4M parameters, 210 steps.

    python train.py config/speedrun_cpu.py

The model uses RoPE, QK-norm, RMSNorm and ReLU²; Muon updates the matrices of the blocks. On the same CPU, nanoGPT's
laptop recipe takes 140 s and ends at 1.898.

Measured: 24 s (2 CPU cores, fp32, n = 5), validation loss 1.884 (n = 5).
"""

out_dir = "out/speedrun_cpu"
dataset = "shakespeare_char"

n_layer = 2
n_head = 2
n_embd = 128
block_size = 64
dropout = 0.0
norm = "rmsnorm"
position = "rope"
activation = "relu2"
qk_norm = True

batch_size = 24
gradient_accumulation_steps = 1
max_iters = 210
optimizer = "muon"
learning_rate = 1e-2
muon_learning_rate = 0.02
weight_decay = 0.0
schedule = "linear"
warmup_iters = 10
min_lr = 2e-4

eval_interval = 210
log_interval = 20
