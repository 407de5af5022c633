"""What the scripts are made of, and what you need not read to understand a GPT."""
