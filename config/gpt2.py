"""The shape of the smallest GPT-2, 12 layers of width 768, for many GPUs and a large text of your own.

    python prepare.py --input=large.txt --dataset=large --tokenizer=byte
    torchrun --standalone --nproc_per_node=8 train.py config/gpt2.py --dataset=large

The model has 86M parameters with the byte tokenizer, and 124M with GPT-2's 50,257 ids. Shape, batch and learning rate
are nanoGPT's defaults: 12 × 1,024 × 40 = 491,520 tokens an optimizer step, on any number of GPUs.

Not measured.
"""

out_dir = "out/gpt2"

eval_interval = 1000
eval_iters = 200
log_interval = 10
