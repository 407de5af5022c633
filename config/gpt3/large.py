"""GPT-3 Large, 760M parameters with 50,257 ids: table 2.1 of Brown et al. 2020, but all attention is dense.

    python train.py config/gpt3/large.py --dry_run=True --vocab_size=50257

Not measured.
"""

base = "medium.py"  # its options hold, but for these
out_dir = "out/gpt3/large"
n_embd = 1536
learning_rate = 2.5e-4
min_lr = 2.5e-5
