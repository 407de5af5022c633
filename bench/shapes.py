"""The models that the benches measure: two of nanoGPT's recipes, and GPT-2's smallest."""

LAPTOP = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "batch_size": 12, "dropout": 0.0}
SHAKESPEARE_10M = {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "batch_size": 16, "dropout": 0.2}
GPT2 = {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024}
GPT2_IDS = 50257
