"""Training of adapters: `train(base, data, recipe)`."""

from hubkit.train.recipe import Recipe
from hubkit.train.trainer import Progress, TrainResult, train

__all__ = ["Progress", "Recipe", "TrainResult", "train"]
