"""The speed of the sampler beside the published CutDiffusion loop on diffusers' modules: `python -m cutdiff.bench`.

Read `__main__` first. `baselines` has the published loop and its faster variants, `parity` proves that all of them
compute the same before any clock runs, `measure` times them, and `report` makes the table. `scaling` compares one
process with several, and `methods` one method with others.
"""
