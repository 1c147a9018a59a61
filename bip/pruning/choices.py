"""The values of settings that choose what is pruned and how. Imports no torch."""

from typing import Literal

LayerType = Literal["unstructured", "filter", "channel", "1:4", "2:4", "4:8"]
Scope = Literal["global", "layer", "erk"]
ScoreInit = Literal["hydra", "kaiming_normal", "kaiming_uniform", "xavier_normal", "xavier_uniform"]

# Layer types that prune whole groups: the weight's axis of which a group is one index.
GROUP_AXIS = {"filter": 0, "channel": 1}

# Layer types n:m keep n of each m weights that follow one another along the input channels, or
# inputs. To add one, name it here and in LayerType.
PATTERNS = {"1:4": (1, 4), "2:4": (2, 4), "4:8": (4, 8)}
