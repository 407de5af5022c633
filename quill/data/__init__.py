"""Text → token files → batches: the known corpora, the tokenizers, the files, and what training reads from them."""
