"""Karpathy's microgpt, the smallest GPT: 4,192 parameters, one name a step, 1,000 steps.

    python train.py config/microgpt.py

docs/scalar_gpt.py trains the same model in plain Python. With --batch_size=32 --max_iters=10000 the validation loss
falls to 2.126 (n = 1).

Measured: 2.2 s (1 CPU core, fp32, n = 3), validation loss 2.379 (n = 5).
"""

out_dir = "out/microgpt"
dataset = "names32k"

n_layer = 1
n_head = 4
n_embd = 16
block_size = 16
norm = "rmsnorm"
norm_embedding = True
norm_final = False
activation = "relu"
tie_weights = False
init_std = 0.08

batch_size = 1
gradient_accumulation_steps = 1
max_iters = 1000
learning_rate = 0.01
min_lr = 0.0
schedule = "linear"
warmup_iters = 0
beta1 = 0.85
beta2 = 0.99
weight_decay = 0.0
grad_clip = 0.0

eval_interval = 1000
log_interval = 100
final_samples = 20
sample_tokens = 16
sample_temperature = 0.5
