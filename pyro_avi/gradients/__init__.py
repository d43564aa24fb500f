"""The noise of gradient estimators on a model and guide: ``gradient_variance``, and what it measures with."""
