"""GPT-3 XL, 1.3B parameters with 50,257 ids: table 2.1 of Brown et al. 2020, but all attention is dense.

    python train.py config/gpt3/xl.py --dry_run=True --vocab_size=50257

The paper's row has 24 heads of width 128, which is more than its width of 2,048. Here there are 16 heads.

Not measured.
"""

base = "large.py"  # its options hold, but for these
out_dir = "out/gpt3/xl"
n_embd = 2048
batch_size = 4
gradient_accumulation_steps = 128  # 4 × 128 × 2,048 tokens: the paper's 1M
max_iters = 286_102  # 300B tokens; the rate warms up over 375M and decays until 260B
warmup_iters = 358
lr_decay_iters = 247_955
learning_rate = 2e-4
min_lr = 2e-5
