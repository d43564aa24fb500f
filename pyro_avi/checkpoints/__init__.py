"""Trainings in files: their format, what tells trainings apart, and from which file a training goes on."""
