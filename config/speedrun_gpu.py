"""Tiny Shakespeare on a GPU: a short run to a lower loss than nanoGPT's GPU recipe, 3.2M parameters.

    python train.py config/speedrun_gpu.py

The model is that of shakespeare_char_laptop.py, with four times the batch and fewer than half of its steps. nanoGPT's
README gives 1.4697, estimated from sampled batches, after three minutes on an A100. This recipe has not run on a GPU.

Measured: 659 s (1 CPU core, bf16, n = 5), validation loss 1.458 (n = 5).
"""

base = "shakespeare_char_laptop.py"  # its options hold, but for these
out_dir = "out/speedrun_gpu"
batch_size = 32
max_iters = 600
learning_rate = 6e-3
muon_learning_rate = 0.03
eval_interval = 600
compile = False  # so that a short run spends no time on compiling
