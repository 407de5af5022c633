"""The quickest way to nanoGPT's laptop loss on a CPU: 0.4M parameters, two layers, 200 steps.

    python train.py config/speedrun_cpu.py

Muon for the blocks' matrices, RoPE, RMSNorm on everything, ReLU². 10 s on two CPU cores with bf16, to a validation loss
of 1.896 (mean of 5 seeds), where nanoGPT's laptop recipe takes 8 to 10 times as long to 1.898 (docs/records.md).
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
