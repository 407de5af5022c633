"""makemore's 32,033 names: 0.2M parameters, a few minutes on two CPU cores.

python train.py config/names32k.py
"""

out_dir = "out/names32k"
dataset = "names32k"

n_layer = 4
n_head = 4
n_embd = 64
block_size = 16
dropout = 0.0

batch_size = 64
gradient_accumulation_steps = 1
max_iters = 3000
learning_rate = 2e-3
min_lr = 2e-4
warmup_iters = 100
beta2 = 0.99

eval_interval = 500
log_interval = 10
final_samples = 20
sample_tokens = 16
