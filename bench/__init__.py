"""The benches, `python -m bench`: one file or folder for each kind. They share measure.py and shapes.py."""
