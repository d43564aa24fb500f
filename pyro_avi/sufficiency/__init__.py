"""Which data a row's factor depends on, and so whether an encoder of the row alone can close the amortization gap."""
