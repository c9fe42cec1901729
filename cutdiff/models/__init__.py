"""The networks of the Stable Diffusion and FLUX families, by hand, and changing their inside for the time of a step.

Read `unet` first: its attributes are the keys of diffusers checkpoints; `layers` has the blocks that it shares with
the `vae`, and `config` the sizes of every network. `flux` and `sd3` are the transformers, made of what is in `joint`;
`positions` and `extrapolation` tell them where their tokens lie. `backbone` is what a run may ask of any of these, and
`inside` changes a network for the time of a step.

Networks map tensors to tensors. They know nothing of sigmas and schedules, of steps and methods, or of files: this room
imports only `cutdiff.parallel`, `cutdiff.settings` and the kernels.
"""
