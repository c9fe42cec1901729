"""LoRA files: low-rank changes of a model's weights, merged into them while the model is loaded.

Read `merge` first, then `file`, which says what a file changes or what is wrong with it. `names` knows the spellings of
keys, `formulas` the kinds of factors, and `metadata` what PEFT writes beside the tensors.

This room sees weights by name, before the networks have them. It knows nothing of how a network computes.
"""

from cutdiff.checkpoint.lora.file import LoraError
from cutdiff.checkpoint.lora.merge import merge

__all__ = ["LoraError", "merge"]
