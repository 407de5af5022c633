"""The smallest GPT of the field, Karpathy's microgpt: 4,192 parameters, one name a step, 1,000 steps.

    python train.py config/microgpt.py

Four seconds on one core, to a mean loss of 2.30 to 2.37 over the last 100 steps and a validation loss of 2.38 (five
seeds, docs/records.md); with --batch_size=32 --max_iters=10000, 35 s and 2.126. docs/scalar_gpt.py is the same model
in plain Python, number by number.
"""

out_dir = "out/microgpt"
dataset = "names32k"

n_layer = 1
n_head = 4
n_embd = 16
block_size = 16
dropout = 0.0
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
