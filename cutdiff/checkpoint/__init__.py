"""Models on disk: reading diffusers folders and SDXL single files, writing diffusers folders."""

from cutdiff.checkpoint.load import load
from cutdiff.checkpoint.save import save_folder

__all__ = ["load", "save_folder"]
