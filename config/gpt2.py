"""The shape of the smallest GPT-2, 12 layers of width 768, for many GPUs and a large text of your own.

    python prepare.py --input=large.txt --dataset=large --tokenizer=byte
    torchrun --standalone --nproc_per_node=8 train.py config/gpt2.py --dataset=large

With the byte tokenizer the model has 86M parameters. With GPT-2's 50,257 ids it would have 124M. The shape, the batch
and the learning rate are the defaults, which are nanoGPT's: 12 × 1,024 × 40 = 491,520 tokens an optimizer step,
whatever the number of GPUs.

Not measured.
"""

out_dir = "out/gpt2"

eval_interval = 1000
eval_iters = 200
log_interval = 10
