"""The modules that the scripts use. You need not read them to understand the GPT."""
