"""GPT-3 Medium, 350M parameters with 50,257 ids: table 2.1 of Brown et al. 2020, but all attention is dense.

    python train.py config/gpt3/medium.py --dry_run=True --vocab_size=50257

Not measured.
"""

base = "small.py"  # its options hold, but for these
out_dir = "out/gpt3/medium"
n_layer = 24
n_head = 16
n_embd = 1024
batch_size = 8
gradient_accumulation_steps = 32  # 8 × 32 × 2,048 tokens: the paper's 0.5M
learning_rate = 3e-4
min_lr = 3e-5
