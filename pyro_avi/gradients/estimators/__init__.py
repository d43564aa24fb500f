"""The estimators that are measured, one a file; the name of the file is that of the estimator.

Each is a final subclass of :class:`~pyro_avi.gradients.estimator.GradientEstimator` named like its file.
"""
