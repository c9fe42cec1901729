"""The speed of the sampler beside the published CutDiffusion loop on diffusers' modules: `python -m cutdiff.bench`.

Read `__main__` first. `baselines` has the published loop and its faster variants, `variants` those of the sampler,
`parity` proves that all of them compute the same before any clock runs, `measure` times them, and `report` makes the
table. `scaling` compares one process with several, and `methods` one method with others. `gpu.sh` measures all that
needs a GPU in one call: `gpu` runs its stages, which are benches and those of `stages`.
"""
