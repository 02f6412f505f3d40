"""The parts of launch/study.py: many short training runs, and what they show."""
