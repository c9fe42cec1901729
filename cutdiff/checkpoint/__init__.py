"""Models on disk: diffusers folders and single files are read, and diffusers folders are written.

Read `load` first, which puts a `model.Model` together: `locate` finds the files, `read` and `header` check and map
them, `folder` or `single` with `families`, `kinds` and `infer` say what they are (`transformers` those of FLUX and
SD3), and `build` makes the networks. The README beside this file tells users which checkpoints are read.

This room knows networks and the schedules of noise. It knows nothing of methods, prompts that are drawn, or pictures.
"""

from cutdiff.checkpoint.embeddings import EmbeddingError
from cutdiff.checkpoint.load import load
from cutdiff.checkpoint.lora import LoraError
from cutdiff.checkpoint.save import save_folder

__all__ = ["EmbeddingError", "LoraError", "load", "save_folder"]
