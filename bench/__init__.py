"""What python -m bench measures, one file for each kind. They use measure.py, and nothing of each other."""
