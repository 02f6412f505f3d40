"""What launch/bench.py measures, and how."""
