"""The training of the embedded weights: two models of the scenes, and the network whose features measure distances.

Read `__main__` first: `python -m cutdiff.training` trains the model, the VAE in `vae` and then the U-Net with its text
encoders in `unet`. `python -m cutdiff.training.flow` trains a transformer of the same scenes on the latents of that
VAE, `python -m cutdiff.training.features` the network whose features measure,
`python -m cutdiff.training.consistency` distils the model for few steps, as a LoRA, and
`python -m cutdiff.training.controlnet` trains a ControlNet that reads the edges of a scene. All share the loop in
`fit`, and a card beside the weights says how they were made.
"""
