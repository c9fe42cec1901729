"""Models on disk: reading diffusers folders and single files, writing diffusers folders."""

from cutdiff.checkpoint.load import load
from cutdiff.checkpoint.lora import LoraError
from cutdiff.checkpoint.save import save_folder

__all__ = ["LoraError", "load", "save_folder"]
