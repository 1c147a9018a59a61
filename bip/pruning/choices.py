"""The values of settings that choose what is pruned and how. Imports no torch."""

from typing import Literal

LayerType = Literal["unstructured", "filter", "channel"]
Scope = Literal["global", "layer", "erk"]
ScoreInit = Literal["hydra", "kaiming_normal", "kaiming_uniform", "xavier_normal", "xavier_uniform"]
