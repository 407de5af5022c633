"""GPT-3 Small, 125M parameters with 50,257 ids: table 2.1 of Brown et al. 2020, but all attention is dense.

    python train.py config/gpt3/small.py --dry_run=True --vocab_size=50257

Not measured.
"""

out_dir = "out/gpt3/small"
n_layer = 12
n_head = 12
n_embd = 768
block_size = 2048
bias = True
batch_size = 16
gradient_accumulation_steps = 16  # 16 × 16 × 2,048 tokens: the paper's 0.5M
max_iters = 572_205  # 300B tokens; the rate warms up over 375M and decays until 260B
warmup_iters = 715
lr_decay_iters = 495_911
learning_rate = 6e-4
min_lr = 6e-5
