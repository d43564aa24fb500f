"""The evidence of rows, known or estimated."""
