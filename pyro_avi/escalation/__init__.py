"""Answers for rows, each by the cheapest method that is good enough for it."""
