"""LoRA files: low-rank changes of a model's weights, merged into them while the model is loaded."""

from cutdiff.checkpoint.lora.file import LoraError
from cutdiff.checkpoint.lora.merge import merge

__all__ = ["LoraError", "merge"]
