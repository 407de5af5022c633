"""GPT-3 13B with 50,257 ids: table 2.1 of Brown et al. 2020, but all attention is dense.

    python train.py config/gpt3/13b.py --dry_run=True --vocab_size=50257

The paper's row has a width of 5,140, which is not 40 heads of width 128. Here the width is 5,120.

Not measured.
"""

base = "6.7b.py"  # its options hold, but for these
out_dir = "out/gpt3/13b"
n_layer = 40
n_head = 40
n_embd = 5120
batch_size = 1
gradient_accumulation_steps = 1024  # 1 × 1,024 × 2,048 tokens: the paper's 2M
learning_rate = 1e-4
min_lr = 1e-5
