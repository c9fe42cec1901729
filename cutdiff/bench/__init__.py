"""The sampler's speed, beside the published CutDiffusion loop on diffusers' modules: `python -m cutdiff.bench`.

Read `__main__` first. `baselines` has the published loop and its faster variants, `parity` proves that all compute the
same before any clock runs, `measure` times them, `report` tells; `scaling` compares one process with several.
"""
