"""How results are shown: numbers and tables as text, figures, ArviZ."""
