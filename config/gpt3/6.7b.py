"""GPT-3 6.7B with 50,257 ids: table 2.1 of Brown et al. 2020, but all attention is dense.

    python train.py config/gpt3/6.7b.py --dry_run=True --vocab_size=50257

Not measured.
"""

base = "2.7b.py"  # its options hold, but for these
out_dir = "out/gpt3/6.7b"
n_embd = 4096
gradient_accumulation_steps = 512  # 2 × 512 × 2,048 tokens: the paper's 2M
max_iters = 143_051  # 300B tokens; the rate warms up over 375M and decays until 260B
warmup_iters = 179
lr_decay_iters = 123_978
learning_rate = 1.2e-4
min_lr = 1.2e-5
