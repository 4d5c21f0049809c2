"""Trainings behind docs/results.md."""
