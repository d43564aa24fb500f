"""The structure of a model: its sites, plates, supports and masks."""
