"""Tiny Shakespeare on a laptop, to the loss that nanoGPT reaches on a GPU: 3.2M parameters.

    python train.py config/shakespeare_char_laptop.py

The model uses RoPE and QK-norm; Muon updates the matrices of the blocks. shakespeare_char_best.py has more steps.
nanoGPT's README gives 1.4697, estimated from sampled batches, after three minutes on an A100.

Measured: 317 s (2 CPU cores, bf16, n = 3), validation loss 1.453 (n = 3).
"""

base = "shakespeare_char_fast.py"  # its options hold, but for these
out_dir = "out/shakespeare_char_laptop"
n_layer = 4
n_embd = 256
activation = "gelu"
ngram = 0
max_iters = 1350
learning_rate = 4e-3
beta1 = 0.9
muon_momentum = 0.95
weight_decay = 0.1
warmup_iters = 20
min_lr = 8e-5
eval_interval = 675
log_interval = 50
