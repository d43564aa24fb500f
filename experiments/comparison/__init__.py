"""Guides compared on one small model whose best bound is known: gaps to it, and how soon each guide gets there."""
