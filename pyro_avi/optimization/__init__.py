"""One step of a training: the loss, its gradient, and what moves by it; eagerly or as one graph."""
