"""The shape of the smallest GPT-2, 12 layers of width 768, for many GPUs and a large text of your own.

    python prepare.py --input=large.txt --dataset=large --tokenizer=byte
    torchrun --standalone --nproc_per_node=8 train.py config/gpt2.py --dataset=large

With the byte tokenizer the model has 86M parameters. With GPT-2's 50,257 ids it would have 124M.

Not measured.
"""

out_dir = "out/gpt2"

n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024
dropout = 0.0
bias = False

# 12 × 1,024 × 40 = 491,520 tokens an optimizer step, whatever the number of GPUs.
batch_size = 12
gradient_accumulation_steps = 40
max_iters = 600_000
learning_rate = 6e-4
min_lr = 6e-5
warmup_iters = 2000
weight_decay = 0.1

eval_interval = 1000
eval_iters = 200
log_interval = 10
