"""GPT-3 175B with 50,257 ids: table 2.1 of Brown et al. 2020, but all attention is dense.

    python train.py config/gpt3/175b.py --dry_run=True --vocab_size=50257

Not measured.
"""

base = "13b.py"  # its options hold, but for these
out_dir = "out/gpt3/175b"
n_layer = 96
n_head = 96
n_embd = 12288
gradient_accumulation_steps = 1536  # 1 × 1,536 × 2,048 tokens: the paper's 3.2M
max_iters = 95_367  # 300B tokens; the rate warms up over 375M and decays until 260B
warmup_iters = 119
lr_decay_iters = 82_652
learning_rate = 6e-5
min_lr = 6e-6
