"""The operators between the canvas and the network, as plain-torch references and as Triton kernels.

The package takes tensors and numbers, and imports nothing from cutdiff. This file imports no torch.
"""

from typing import Literal, get_args

Grain = Literal["channel", "pixel", "none"]
GRAINS: tuple[str, ...] = get_args(Grain)
"""The grains of a permutation of patches.

"channel" permutes every channel of a pixel by itself, as the published code does; "pixel" moves all channels of a pixel
together, as the text of the paper says; "none" leaves everything where it is.
"""
