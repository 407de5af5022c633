"""Rung 8 of the ladder: dropout. All parts of a GPT, at a small size.

    python train.py config/ladder/8_dropout.py

In training, a tenth of the activations is set to zero at random. This reduces overfitting in large models; it raises
the loss of this small one. config/shakespeare_char.py has the same parts at a larger size.

Measured: 170 s (1 CPU core, fp32, n = 3), validation loss 1.781 (n = 3).
"""

out_dir = "out/ladder/8_dropout"
dataset = "shakespeare_char"

n_layer = 4
n_head = 4
n_embd = 64
block_size = 64
position = "learned"
mlp_ratio = 4.0
residual = True
norm = "layernorm"
tie_weights = False
init_std = 0.1
dropout = 0.1  # new here

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
