"""GPT-3 2.7B with 50,257 ids: table 2.1 of Brown et al. 2020, but all attention is dense.

    python train.py config/gpt3/2.7b.py --dry_run=True --vocab_size=50257

Not measured.
"""

base = "xl.py"  # its options hold, but for these
out_dir = "out/gpt3/2.7b"
n_layer = 32
n_head = 32
n_embd = 2560
batch_size = 2
gradient_accumulation_steps = 256  # 2 × 256 × 2,048 tokens: the paper's 1M
learning_rate = 1.6e-4
min_lr = 1.6e-5
