"""The quickest way to nanoGPT's laptop loss on a CPU: 0.4M parameters, two layers, 210 steps.

    python train.py config/speedrun_cpu.py

Muon for the blocks' matrices, RoPE, QK-norm, RMSNorm, ReLU². 24 s on two CPU cores without bf16, to a validation loss
of 1.884 (mean of 5 seeds), where nanoGPT's laptop recipe takes 140 s to 1.898; with bf16 an earlier version took 10 s
to 1.896, and nanoGPT 9.9 times as long (docs/records.md).
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
