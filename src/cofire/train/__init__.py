"""Training: from a run's spec to a folder with a trained model, its measurements and its report."""

from cofire.train.trainer import RunResult, fit

__all__ = ["RunResult", "fit"]
