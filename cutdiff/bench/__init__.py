"""The sampler's speed, beside the published CutDiffusion loop on diffusers' modules: `python -m cutdiff.bench`."""
