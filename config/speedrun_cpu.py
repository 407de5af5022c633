"""Tiny Shakespeare: the fastest run to nanoGPT's laptop loss on a CPU, 0.4M parameters, 210 steps.

    python train.py config/speedrun_cpu.py

The model uses RoPE, QK-norm, RMSNorm and ReLU²; Muon updates the matrices of the blocks. On the same CPU, nanoGPT's
laptop recipe takes 140 s and ends at 1.898.

Measured: 24 s (2 CPU cores, fp32, n = 5), validation loss 1.884 (n = 5).
"""

base = "shakespeare_char_fast.py"  # its options hold, but for these
out_dir = "out/speedrun_cpu"

n_layer = 2
n_head = 2
norm = "rmsnorm"

batch_size = 24
max_iters = 210
muon_learning_rate = 0.02

eval_interval = 210
