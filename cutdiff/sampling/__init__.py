"""The material that methods are made of: a denoiser for the native size, and everything around it.

Read `stages` first: a run is a list of stages, and `solve` is the loop over them. `denoiser` puts text, guidance and
size conditioning around the U-Net; `operators` lead from the canvas to the network and back; `draws` makes every random
number. `solvers`, `schedules` and `guidance` hold what ships of each seam, `projected` and `perturbed` the guidances
that remember or need a third estimate; `rows` has the text of a step. `resize`, `split`, `mean_picture` and `text_maps`
are for methods that carry something from one size to another, `overlaps` has windows without an average, and `regions`
makes one picture of several prompts. `noise`, `edm`, `flow` and `preconditioning` say how a model was trained. Nothing
here knows a file or a command line.
"""
