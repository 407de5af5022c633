"""From a text to batches: the known corpora, the tokenizers, the token files and what training reads from them."""
