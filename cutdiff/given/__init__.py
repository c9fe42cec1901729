"""The things that a run is given beside its prompts: pictures, prompts for parts of them, and hints for ControlNets.

Read `pictures` first, which reads a file whole and keeps its hash; `regions` and `controls` are made of it. This room
imports no torch, and knows nothing of models.
"""
