"""One model trained by several processes: what they exchange, and the parameters of rows that each of them holds."""
