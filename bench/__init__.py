"""The benches, `python -m bench`: one file for each kind. They share measure.py."""
