"""Tiny Shakespeare: the fastest run to nanoGPT's laptop loss on a CPU, one block, 42 steps.

    python train.py config/speedrun_cpu.py

Of its 3.6M parameters, 3.1M are vectors for the last 2 to 5 characters, which learn in few steps. The model uses RoPE,
QK-norm, RMSNorm and ReLU², and Muon updates the matrices of the block. On the same CPU, nanoGPT's laptop recipe takes
105 s and ends at 1.898.

Measured: 4.6 s (2 CPU cores, bf16, n = 5), validation loss 1.879 (n = 10).
"""

base = "shakespeare_char_fast.py"  # its options hold, but for these
out_dir = "out/speedrun_cpu"
n_layer = 1
n_head = 3
n_embd = 192
block_size = 64
norm = "rmsnorm"
ngram_rows = 65_536
batch_size = 24
max_iters = 42
learning_rate = 3e-2
beta1 = 0.7
muon_learning_rate = 0.02
muon_momentum = 0.85
warmup_iters = 1
eval_interval = 42
log_interval = 10
