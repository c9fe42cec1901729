"""The embedded world: captioned scenes that can be rendered truly at every resolution, and read off a picture again.

Read `world` first: it says which parameters a scene has and what its caption is. `render` draws scenes, `read` (with
`blobs`) tells what a picture shows, and `vocabulary` makes text encoders that know the words of the captions.
"""
