"""What bench.py measures, one file for each kind. They use measure.py, and nothing of each other."""
