"""Trainings: batches, the loop, its result, checkpoints."""
